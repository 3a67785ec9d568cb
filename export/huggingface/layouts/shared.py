"""What layouts share: fields of config.json and tensors of attention, MLPs, embedding and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from recollect.configuration import UserError
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import PLAIN, TRANSPOSED, Form, LayerTensors
from recollect.layers.mixer import MixerConfig
from recollect.layers.mixers.attention import SoftmaxConfig
from recollect.layers.modules.mlp import MlpConfig, SwiGLU
from recollect.layers.modules.norms import RMSNorm
from recollect.layers.modules.positions import Rotary
from recollect.models import LanguageModel, Stage, repeat

M = TypeVar("M", bound=MixerConfig)


def only(model: LanguageModel, *kinds: type) -> bool:
    """Returns whether every mixer is of one of these kinds, and one of the first."""
    types = {type(mixer) for mixer in model.mixers}
    return kinds[0] in types and types <= set(kinds)


def first(model: LanguageModel, kind: type[M]) -> M:
    """Returns the first mixer of a kind, or one of its defaults where there is none."""
    return next((mixer for mixer in model.mixers if type(mixer) is kind), kind())  # type: ignore[misc]


def stages(mixers: Sequence[MixerConfig]) -> tuple[Stage, ...]:
    """Returns stages of the shortest pattern that these mixers repeat."""
    n = len(mixers)
    period = next(p for p in range(1, n + 1) if all(mixers[i] == mixers[i % p] for i in range(n)))
    return repeat(*mixers[:period], depth=n)


def layer_types(model: LanguageModel, names: Mapping[type, str]) -> list[str]:
    """Returns the name of every layer's kind."""
    return [names[type(mixer)] for mixer in model.mixers]


def typed_layers(config: HuggingFaceConfig, field: str, mixers: Mapping[str, MixerConfig], default: Any) -> Any:
    """Returns the stages that a list of names in config.json describes; `default` stands for a missing list.

    Raises:
      UserError: it is not a list with a known name for each layer.
    """
    layers = config.whole("num_hidden_layers")
    types = config.fields.get(field)
    types = default(layers) if types is None else types
    if not isinstance(types, list) or len(types) != layers or not all(str(kind) in mixers for kind in types):
        raise UserError(f"{config.where}: {field} must name {' or '.join(mixers)} for each of {layers} layers")
    return stages([mixers[str(kind)] for kind in types])


def decoder_fields(model: LanguageModel, kind: str, architecture: str) -> dict[str, Any]:
    """Returns the fields that decoders with an MLP after every mixer share; the MLP must have a gate."""
    require(type(model.norm) is RMSNorm, "model.norm", model.norm, f"{kind} has RMSNorm")
    require(isinstance(model.mlp, SwiGLU), "model.mlp", model.mlp, f"{kind} has an MLP with a gate")
    assert model.mlp is not None
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": model.width,
        "intermediate_size": model.mlp.inner(model.width),
        "num_hidden_layers": len(model.mixers),
        "rms_norm_eps": model.norm.epsilon,
        "attention_dropout": 0.0,
    }


def attention_fields(mixer: SoftmaxConfig, width: int) -> dict[str, Any]:
    """Returns the fields of softmax attention with rotary positions."""
    rotary = mixer.positions if isinstance(mixer.positions, Rotary) else Rotary()
    rope = {"rope_type": "default", "rope_theta": rotary.base, "partial_rotary_factor": rotary.fraction}
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.key_heads or mixer.heads,
        "head_dim": mixer.head_width(width),
        "attention_bias": mixer.bias,
        "rope_theta": rotary.base,
        "rope_parameters": rope,
        "partial_rotary_factor": rotary.fraction,
    }


def attention_of(
    config: HuggingFaceConfig, *, base: float = 10_000.0, fraction: float | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """Returns the fields of a mixer of softmax attention. The layout's defaults are given; fraction None: it rotates
    whole heads."""
    heads = config.whole("num_attention_heads")
    return {
        "heads": heads,
        "key_heads": config.whole("num_key_value_heads", heads),
        "head_dim": config.whole("head_dim", head_dim or config.whole("hidden_size") // heads or 1),
        "positions": rotary_of(config, base, fraction),
        "bias": config.flag("attention_bias", False),
    }


def rotary_of(config: HuggingFaceConfig, base: float, fraction: float | None) -> Rotary:
    """Returns the rotary positions of a config.json; raises UserError for kinds that this project reads from none."""
    rope = config.table("rope_parameters") or config.table("rope_scaling")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{config.where}: rope_parameters: this project has rotary positions of type 'default' only")
    base = config.number("rope_theta", config.number("rope_theta", base), rope)
    if fraction is None:
        return Rotary(base=base)
    part = config.number("partial_rotary_factor", config.number("partial_rotary_factor", fraction), rope)
    return Rotary(base=base, fraction=part)


def decoder(
    config: HuggingFaceConfig, stages: tuple[Stage, ...], *, epsilon: str = "rms_norm_eps", **fields: Any
) -> Any:
    """Returns the model around its stages."""
    config.one_of("hidden_act", "silu", "silu")
    settings: dict[str, Any] = {
        "width": config.whole("hidden_size"),
        "stages": stages,
        "norm": RMSNorm(epsilon=config.number(epsilon, 1e-6)),
        "tied": config.flag("tie_word_embeddings", False),
    }
    if "mlp" not in fields:
        settings["mlp"] = SwiGLU(hidden=config.whole("intermediate_size"))
    return LanguageModel(**{**settings, **fields})


LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj"}
    | {"up": "mlp.up_proj", "down": "mlp.down_proj", "final": "model.norm", "embedding": "model.embed_tokens"}
)


def decoder_tensors(
    model: LanguageModel,
    names: Mapping[str, str] = LLAMA_NAMES,
    *,
    layer: str = "model.layers.{}.",
    gain: Form = PLAIN,
    embedding: Form = PLAIN,
) -> LayerTensors:
    """Returns a table with all but the mixers.

    Args:
      names: of the layout's modules; without "gate" the MLPs are left out.
      gain, embedding: forms of the norms' gains and of the embedding.
    """
    table = LayerTensors(model, layer)
    table.add(names["embedding"] + ".weight", "embedding", embedding)
    table.add_layers(names["mixer_norm"] + ".weight", "mixer_norm.gain", form=gain)
    if "mlp_norm" in names:
        table.add_layers(names["mlp_norm"] + ".weight", "mlp_norm.gain", form=gain)
    if "gate" in names:
        assert isinstance(model.mlp, MlpConfig)
        for part in ("gate", "up", "down"):
            table.add_linear(names[part], f"mlp.{part}", bias=model.mlp.bias)
    table.add(names["final"] + ".weight", "final_norm.gain", gain)
    if not model.tied:
        table.add("lm_head.weight", "head.kernel", TRANSPOSED)
    return table


def attention_tensors(
    table: LayerTensors,
    of: type[SoftmaxConfig],
    *,
    gain: Form = PLAIN,
    module: str = "self_attn",
    output: str = "o_proj",
    norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> None:
    """Adds softmax attention as Llama names it."""
    mixer = first(table.model, of)
    for letter, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        table.add_linear(f"{module}.{letter}_proj", f"mixer.{ours}", of=of, bias=mixer.bias)
    table.add_linear(f"{module}.{output}", "mixer.output", of=of, bias=mixer.bias)
    if mixer.query_key_norm:
        for name, ours in zip(norms, ("query_norm", "key_norm"), strict=True):
            table.add_layers(f"{module}.{name}.weight", f"mixer.{ours}.gain", of=of, form=gain)
