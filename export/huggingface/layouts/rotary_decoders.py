"""Softmax attention with rotary positions and SwiGLU as Llama, Qwen3 (query/key norm, windows in some layers), Mistral
(windows in all) and Phi-3 (rotary positions on a part of each head).

Source: modeling_llama.py, modeling_qwen3.py, modeling_mistral.py, modeling_phi3.py of transformers 5.24, whose window
counts the query's own key as `SlidingWindow.window` does. Phi-3 fuses queries, keys and values, and gate and up.
"""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.requirements import HuggingFaceConfig, require, require_defaults
from recollect.export.huggingface.tensors import TRANSPOSED, LayerTensors, Tensor
from recollect.layers import Attention, SlidingWindow
from recollect.layers.modules.mlp import SwiGLU
from recollect.layers.modules.norms import RMSNorm
from recollect.layers.modules.positions import Rotary
from recollect.models import LanguageModel, Stage, repeat

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
HEAD_NORM_EPSILON = 1e-6
"""Of the norms of queries and keys here, which Qwen3 gives the epsilon of all its norms."""

_EXPRESSED = {"heads", "key_heads", "head_dim", "positions", "query_key_norm", "bias"}


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json that describe `model`.

    Raises:
      UserError: none of the layouts can express it; the field is named.
    """
    rotary, windows = _checked(model)
    first, mlp = model.mixers[0], model.mlp
    assert isinstance(first, Attention | SlidingWindow) and isinstance(mlp, SwiGLU)
    uniform = len(set(windows)) == 1
    if first.query_key_norm:
        kind, mlp_bias, bias = "qwen3", False, first.bias
        require(rotary.fraction == 1, "positions.fraction", rotary.fraction, "Qwen3 rotates whole heads")
        reason = f"Qwen3's query and key norms share it, and here they have {HEAD_NORM_EPSILON}"
        require(model.norm.epsilon == HEAD_NORM_EPSILON, "norm.epsilon", model.norm.epsilon, reason)
    else:
        require(uniform, "model.stages", windows, "windows in some layers alone need query_key_norm (Qwen3)")
        windowed, partial = windows[0] is not None, rotary.fraction < 1
        kind = "phi3" if partial else "mistral" if windowed else "llama"
        bias, mlp_bias = (False, False) if kind != "llama" else (first.bias, mlp.bias)
    named = CLASSES[kind].removesuffix("ForCausalLM")
    require(first.bias == bias, "bias", first.bias, f"{named}'s attention has none")
    require(mlp.bias == mlp_bias, "mlp.bias", mlp.bias, f"{named}'s MLP has none")
    head_dim = first.head_width(model.width)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.base}
    fields: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": model.width,
        "intermediate_size": mlp.inner(model.width),
        "num_hidden_layers": len(model.mixers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.key_heads or first.heads,
        "head_dim": head_dim,
        "rms_norm_eps": model.norm.epsilon,
        "rope_theta": rotary.base,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
    }
    if kind == "llama":
        fields |= {"attention_bias": bias, "mlp_bias": mlp_bias}
    if kind == "qwen3":
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        width = next((window for window in windows if window is not None), None)
        fields |= {"attention_bias": bias, "layer_types": types, "sliding_window": width}
        fields |= {"use_sliding_window": width is not None, "max_window_layers": 0}
    if kind in ("mistral", "phi3"):
        fields["sliding_window"] = windows[0]
    if kind == "phi3":
        require(head_dim * first.heads == model.width, "head_dim", head_dim, "Phi-3 has width / heads")
        fields["partial_rotary_factor"] = rotary.fraction
        rope["partial_rotary_factor"] = rotary.fraction
    return fields


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model that a config.json of one of the layouts describes.

    Raises:
      UserError: a value that this project does not have.
    """
    kind = config.fields["model_type"]
    config.one_of("hidden_act", "silu", "silu")
    width = config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    rope = config.table("rope_parameters") or config.table("rope_scaling")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{config.where}: rope_parameters: this project has rotary positions of type 'default' only")
    base = config.number("rope_theta", config.number("rope_theta", 10_000.0), rope)
    factor = config.number("partial_rotary_factor", 1.0)
    fraction = config.number("partial_rotary_factor", factor, rope) if kind == "phi3" else 1.0
    fields: dict[str, Any] = {
        "heads": heads,
        "key_heads": config.whole("num_key_value_heads", heads),
        "head_dim": config.whole("head_dim", 128 if kind == "qwen3" else width // heads or 1),
        "positions": Rotary(base=base, fraction=fraction),
        "query_key_norm": kind == "qwen3",
        "bias": config.flag("attention_bias", False) if kind in ("llama", "qwen3") else False,
    }
    windows = _windows(config, kind, config.whole("num_hidden_layers"))
    mixers = [Attention(**fields) if window is None else SlidingWindow(window=window, **fields) for window in windows]
    epsilon = config.number("rms_norm_eps", 1e-6)
    if kind == "qwen3" and epsilon != HEAD_NORM_EPSILON:
        reason = f"query and key norms have {HEAD_NORM_EPSILON} here"
        raise UserError(f"{config.where}: rms_norm_eps={epsilon}: {reason}")
    mlp_bias = config.flag("mlp_bias", False) if kind == "llama" else False
    return LanguageModel(
        width=width,
        stages=repeat(mixers[0], depth=len(mixers)) if len(set(windows)) == 1 else (Stage(pattern=tuple(mixers)),),
        norm=RMSNorm(epsilon=epsilon),
        mlp=SwiGLU(hidden=config.whole("intermediate_size"), bias=mlp_bias),
        tied=config.flag("tie_word_embeddings", False),
    )


def tensors_of(model: LanguageModel, kind: str) -> list[Tensor]:
    """Returns the table of tensors of `model` in the layout `kind`."""
    first, mlp = model.mixers[0], model.mlp
    assert isinstance(first, Attention | SlidingWindow) and isinstance(mlp, SwiGLU)
    table = LayerTensors(model, "model.layers.{}.")
    table.add("model.embed_tokens.weight", "embedding")
    table.add_layers("input_layernorm.weight", "mixer_norm.gain")
    if kind == "phi3":
        table.add_linear("self_attn.qkv_proj", "mixer.query", "mixer.key", "mixer.value", bias=False)
        table.add_linear("mlp.gate_up_proj", "mlp.gate", "mlp.up", bias=False)
    else:
        for letter, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            table.add_linear(f"self_attn.{letter}_proj", f"mixer.{ours}", bias=first.bias)
        for ours in ("gate", "up"):
            table.add_linear(f"mlp.{ours}_proj", f"mlp.{ours}", bias=mlp.bias)
    if kind == "qwen3":
        table.add_layers("self_attn.q_norm.weight", "mixer.query_norm.gain")
        table.add_layers("self_attn.k_norm.weight", "mixer.key_norm.gain")
    table.add_linear("self_attn.o_proj", "mixer.output", bias=first.bias)
    table.add_layers("post_attention_layernorm.weight", "mlp_norm.gain")
    table.add_linear("mlp.down_proj", "mlp.down", bias=mlp.bias)
    table.add("model.norm.weight", "final_norm.gain")
    if not model.tied:
        table.add("lm_head.weight", "head.kernel", TRANSPOSED)
    return table.tensors


def _checked(model: LanguageModel) -> tuple[Rotary, list[int | None]]:
    """Returns what positions and which windows the layers have; raises UserError for what no layout has."""
    require(type(model.norm) is RMSNorm, "model.norm", model.norm, "Llama and its kin have RMSNorm")
    require(type(model.mlp) is SwiGLU, "model.mlp", model.mlp, "Llama and its kin have SwiGLU")
    first, windows = model.mixers[0], []
    for layer, mixer in enumerate(model.mixers):
        path = f"layer {layer}: "
        require(type(mixer) in (Attention, SlidingWindow), f"{path}mixer", mixer, "layouts have softmax attention")
        assert isinstance(mixer, Attention | SlidingWindow)
        require_defaults(mixer, path + type(mixer).__name__, {*_EXPRESSED, "window", "first"})
        positions = mixer.positions
        require(type(positions) is Rotary, f"{path}positions", positions, "Llama and its kin have Rotary")
        assert isinstance(positions, Rotary)
        require(positions.layout == "half", f"{path}layout", positions.layout, "Llama and its kin rotate halves")
        for name in sorted(_EXPRESSED):
            value = getattr(mixer, name)
            require(value == getattr(first, name), f"{path}{name}", value, "all layers must have the same")
        windows.append(mixer.window if isinstance(mixer, SlidingWindow) else None)
    sizes = {window for window in windows if window is not None}
    require(len(sizes) <= 1, "window", sorted(sizes), "windows of all layers must have one size")
    positions = first.positions  # type: ignore[attr-defined]
    assert isinstance(positions, Rotary)
    return positions, windows


def _windows(config: HuggingFaceConfig, kind: str, layers: int) -> list[int | None]:
    """Returns the window of each layer, None for full attention."""
    window = config.fields.get("sliding_window")
    if kind == "llama" or window is None:
        return [None] * layers
    size = config.whole("sliding_window")
    if kind != "qwen3":
        return [size] * layers
    if not config.flag("use_sliding_window", False):
        return [None] * layers
    after = config.fields.get("max_window_layers", 28)
    types = config.fields.get("layer_types")
    if types is None and isinstance(after, int):
        return [size if layer >= after else None for layer in range(layers)]
    known = {"full_attention": None, "sliding_attention": size}
    if not isinstance(types, list) or len(types) != layers or not all(str(kind) in known for kind in types):
        raise UserError(f"{config.where}: layer_types must name {' or '.join(known)} for each of {layers} layers")
    return [known[kind] for kind in types]
