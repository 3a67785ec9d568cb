"""Models of the flash-linear-attention library (0.6; fla/models and fla/layers there): one recurrent mixer, maybe with
rotary softmax attention or windows in some layers. They load there once `fla` is imported.

Easy to get wrong: the library gives the norm of the heads the epsilon of all norms; HGRN2 reads its state divided by
sqrt(k), which its inputs make up for; GLA's rank and temperature stand in no config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import TAPS, Form, LayerTensors, Tensor, shaped
from recollect.layers import (
    HGRN2,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    Retention,
    SlidingWindow,
)
from recollect.layers.mixer import MixerConfig
from recollect.layers.recurrent import HeadSizes, RecurrentConfig
from recollect.models import LanguageModel

CLASSES = {
    "gla": "GLAForCausalLM",
    "retnet": "RetNetForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "kda": "KDAForCausalLM",
    "hgrn2": "HGRN2ForCausalLM",
}
MIXERS: dict[str, type[RecurrentConfig]] = {
    "gla": GatedLinearAttention,
    "retnet": Retention,
    "delta_net": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "hgrn2": HGRN2,
}
SOFTMAX = (Attention, SlidingWindow)
HEAD_NORM_EPSILON = 1e-5
"""Of the heads' norms here, but for Gated DeltaNet's, which has a field for it."""
NAMES = {"mixer_norm": "attn_norm", "mlp_norm": "mlp_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
NAMES |= {"down": "mlp.down_proj", "final": "model.norm", "embedding": "model.embeddings"}


def fits(model: LanguageModel) -> bool:
    """Returns whether the mixers are one of the recurrent kinds, and softmax attention."""
    return any(shared.only(model, mixer, *SOFTMAX) for mixer in MIXERS.values())


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    kind = next(kind for kind, mixer in MIXERS.items() if shared.only(model, mixer, *SOFTMAX))
    mixer = shared.first(model, MIXERS[kind])
    fields = shared.decoder_fields(model, kind, CLASSES[kind])
    fields |= {"norm_eps": fields.pop("rms_norm_eps"), "hidden_act": "swish", "fuse_cross_entropy": False}
    softmax = [number for number, each in enumerate(model.mixers) if type(each) in SOFTMAX]
    if softmax:
        fields["attn"] = _attention_fields(model.mixers[softmax[0]], softmax)
    sizes = mixer.sizes(model.width)
    kernel = getattr(mixer, "kernel", None)
    fields |= {"use_short_conv": kernel is not None, "conv_size": kernel or 4}
    return fields | _sizes(kind, sizes, model.width) | _switches(mixer)


def _sizes(kind: str, sizes: HeadSizes, width: int) -> dict[str, Any]:
    """Returns the fields that state the sizes of the recurrent layers."""
    key_heads, heads, k, v = sizes
    if kind in ("gated_deltanet", "kda"):
        return {"num_heads": key_heads, "num_v_heads": heads, "head_dim": k, "expand_v": _ratio(v, k)}
    if kind == "hgrn2":
        return {"num_heads": heads, "expand_ratio": k}
    return {"num_heads": heads, "expand_k": _ratio(heads * k, width), "expand_v": _ratio(heads * v, width)}


def _switches(mixer: RecurrentConfig) -> dict[str, Any]:
    """Returns the fields of single mixers."""
    if isinstance(mixer, HGRN2):
        return {"use_lower_bound": mixer.lower_bounds}
    if not isinstance(mixer, DeltaNet | GatedDeltaNet | KimiDeltaAttention):
        return {"use_output_gate": True}
    fields: dict[str, Any] = {"allow_neg_eigval": mixer.negative_eigenvalues}
    if isinstance(mixer, KimiDeltaAttention):
        bound = mixer.bound
        return fields | {"safe_gate": bound is not None, "lower_bound": None if bound is None else -bound}
    return fields | {"use_gate": mixer.gate if isinstance(mixer, DeltaNet) else True}


def _ratio(part: int, whole: int) -> float:
    """Returns a number that gives `part` as int(whole * number)."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)


def _attention_fields(mixer: Any, layers: list[int]) -> dict[str, Any]:
    """Returns the object `attn`: softmax attention and its layers."""
    require(not mixer.bias, "bias", mixer.bias, "its attention has biases on queries, keys and values alone")
    return {
        "layers": layers,
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.key_heads or mixer.heads,
        "qkv_bias": False,
        "window_size": mixer.window if isinstance(mixer, SlidingWindow) else None,
        "rope_theta": getattr(mixer.positions, "base", 10_000.0),
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    kind, width = config.fields["model_type"], config.whole("hidden_size")
    epsilon = config.number("norm_eps", 1e-6)
    if kind != "gated_deltanet" and epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: norm_eps={epsilon}: the heads' norms have {HEAD_NORM_EPSILON} here")
    for name in ("attnres_block_size", "clamp_min", "feature_map", "num_kv_heads"):
        config.one_of(name, None, None)
    config.one_of("hidden_act", "swish", "swish")
    mixer = _READERS[kind](config, width, epsilon)
    layers: list[MixerConfig] = [mixer] * config.whole("num_hidden_layers", 24)
    for number, attention in _attention_of(config, len(layers)).items():
        layers[number] = attention
    silu = HuggingFaceConfig({**config.fields, "hidden_act": "silu"}, config.where)
    return shared.decoder(silu, shared.stages(layers), epsilon="norm_eps")


def _attention_of(config: HuggingFaceConfig, depth: int) -> dict[int, MixerConfig]:
    """Returns the softmax attention of a config.json by layer."""
    if config.fields.get("attn") is None:
        return {}
    fields = config.table("attn")
    spec = HuggingFaceConfig(fields, f"{config.where}: attn")
    spec.one_of("qkv_bias", False, False)
    heads = spec.whole("num_heads")
    layers = fields.get("layers")
    if not isinstance(layers, list) or not all(type(number) is int and 0 <= number < depth for number in layers):
        raise UserError(f"{spec.where}: layers must be numbers of layers, from 0 to {depth - 1}")
    head = shared.rotary_of(HuggingFaceConfig({"rope_theta": fields.get("rope_theta")}, spec.where), 10_000.0, None)
    same: dict[str, Any] = {"heads": heads, "key_heads": spec.whole("num_kv_heads", heads), "positions": head}
    window = fields.get("window_size")
    mixer: MixerConfig = Attention(**same)
    if window is not None:
        mixer = SlidingWindow(window=spec.whole("window_size"), **same)
    return dict.fromkeys(layers, mixer)


def _of_width(config: HuggingFaceConfig, width: int, share_k: float, share_v: float) -> dict[str, Any]:
    """Returns heads and their dimensions, of a config whose sizes are shares of the width."""
    heads = config.whole("num_heads")
    sizes = {}
    for name, field, share in (("key_dim", "expand_k", share_k), ("value_dim", "expand_v", share_v)):
        whole = int(width * config.number(field, share))
        if whole % heads or not whole:
            raise UserError(f"{config.where}: {field}: {whole} dimensions do not divide among num_heads={heads}")
        sizes[name] = whole // heads
    return {"heads": heads, **sizes}


def _per_head(config: HuggingFaceConfig, heads: int, dim: int, share: float) -> dict[str, Any]:
    """Returns heads and their dimensions, of a config with `head_dim`; the arguments are the layout's defaults."""
    key_heads, key_dim = config.whole("num_heads", heads), config.whole("head_dim", dim)
    return {
        "heads": config.whole("num_v_heads", key_heads),
        "key_heads": key_heads,
        "key_dim": key_dim,
        "value_dim": max(1, int(key_dim * config.number("expand_v", share))),
        "kernel": _kernel(config, True),
        "negative_eigenvalues": config.flag("allow_neg_eigval", False),
    }


def _kernel(config: HuggingFaceConfig, default: bool) -> int | None:
    return config.whole("conv_size", 4) if config.flag("use_short_conv", default) else None


def _gla(config: HuggingFaceConfig, width: int, epsilon: float) -> GatedLinearAttention:
    config.one_of("use_output_gate", True, True)
    return GatedLinearAttention(kernel=_kernel(config, False), **_of_width(config, width, 0.5, 1.0))


def _retnet(config: HuggingFaceConfig, width: int, epsilon: float) -> Retention:
    config.one_of("use_output_gate", True, True)
    return Retention(**_of_width(config, width, 1.0, 2.0))


def _delta_net(config: HuggingFaceConfig, width: int, epsilon: float) -> DeltaNet:
    for name, value in (("use_beta", True), ("qk_norm", "l2"), ("qk_activation", "silu")):
        config.one_of(name, value, value)
    gate, negative = config.flag("use_gate", False), config.flag("allow_neg_eigval", False)
    sizes = _of_width(config, width, 1.0, 1.0)
    return DeltaNet(gate=gate, negative_eigenvalues=negative, kernel=_kernel(config, True), **sizes)


def _gated_deltanet(config: HuggingFaceConfig, width: int, epsilon: float) -> GatedDeltaNet:
    config.one_of("use_gate", True, True)
    return GatedDeltaNet(norm_epsilon=epsilon, **_per_head(config, 6, 256, 2.0))


def _kda(config: HuggingFaceConfig, width: int, epsilon: float) -> KimiDeltaAttention:
    lower = config.fields.get("lower_bound")
    bounded = config.flag("safe_gate", False)
    if bounded and not (isinstance(lower, int | float) and not isinstance(lower, bool) and -math.inf < lower < 0):
        raise UserError(f"{config.where}: lower_bound={lower!r}: must be a negative number")
    bound = -float(lower) if bounded and lower is not None else None
    return KimiDeltaAttention(bound=bound, **_per_head(config, 16, 128, 1.0))


def _hgrn2(config: HuggingFaceConfig, width: int, epsilon: float) -> HGRN2:
    config.one_of("use_lower_bound", True, False)
    config.one_of("use_short_conv", False, False)
    ratio = config.fields.get("expand_ratio", 128)
    heads = config.whole("num_heads") if ratio is None else width // config.whole("expand_ratio", 128)
    if not heads or width % heads:
        raise UserError(f"{config.where}: expand_ratio={ratio}: must divide hidden_size={width}")
    return HGRN2(heads=heads, lower_bounds=False)


_READERS: dict[str, Callable[[HuggingFaceConfig, int, float], MixerConfig]] = {
    "gla": _gla,
    "retnet": _retnet,
    "delta_net": _delta_net,
    "gated_deltanet": _gated_deltanet,
    "kda": _kda,
    "hgrn2": _hgrn2,
}


def tensors_of(model: LanguageModel, kind: str) -> list[Tensor]:
    """Returns the table of tensors of `model` in the layout `kind`."""
    table, of = shared.decoder_tensors(model, NAMES), MIXERS[kind]
    mixer = shared.first(model, of)
    _, heads, key_dim, value_dim = mixer.sizes(model.width)
    inputs = {"query": "q", "key": "k", "value": "v"}
    if kind == "hgrn2":
        inputs = {"query": "q", "key": "f", "value": "i"}
    for ours, letter in inputs.items():
        scaled: dict[str, Any] = {"form": _times(key_dim**0.5)} if letter == "i" else {}
        table.add_linear(f"attn.{letter}_proj", f"mixer.{ours}", of=of, **scaled)
        if getattr(mixer, "kernel", None) is not None:
            table.add_layers(f"attn.{letter}_conv1d.weight", f"mixer.convolutions.{ours}.taps", of=of, form=TAPS)
    table.add_linear("attn.o_proj", "mixer.output", of=of)
    _add_gates(table, kind, mixer, shaped((heads, value_dim), (heads * value_dim,)))
    if kind in ("gated_deltanet", "kda"):
        per_channel: dict[str, Any] = {"form": shaped((heads, key_dim), (heads * key_dim,))} if kind == "kda" else {}
        table.add_layers("attn.A_log", "mixer.decay.log_rate", of=of)
        table.add_layers("attn.dt_bias", "mixer.decay.step_bias", of=of, **per_channel)
    for softmax in SOFTMAX:
        shared.attention_tensors(table, softmax, module="attn")
    return table.tensors


def _add_gates(table: LayerTensors, kind: str, mixer: RecurrentConfig, flat: Form) -> None:
    """Adds what makes decays, strengths and gates, and the heads' norm; `flat` is the form of a gain (h, v)."""
    of, gate, decay = type(mixer), "mixer.gate.projection", "mixer.decay.projection"
    if kind == "hgrn2":
        table.add_layers("attn.g_norm.weight", "mixer.norm.gain", of=of, form=flat)
        return
    norm = "attn.g_norm_swish_gate.weight" if kind in ("gla", "retnet") else "attn.o_norm.weight"
    table.add_layers(norm, "mixer.gate.norm.gain", of=of)
    if kind == "kda":
        _add_low_rank(table, "f_proj", decay, of, bias=False)
        _add_low_rank(table, "g_proj", gate, of, bias=True)
    elif getattr(mixer, "gate", True):
        table.add_linear("attn.g_proj", gate, of=of)
    if kind == "gla":
        _add_low_rank(table, "gk_proj", decay, of, bias=True)
    if kind == "gated_deltanet":
        table.add_linear("attn.a_proj", decay, of=of)
    if kind in ("delta_net", "gated_deltanet", "kda"):
        table.add_linear("attn.b_proj", "mixer.strength.projection", of=of)


def _add_low_rank(table: LayerTensors, name: str, ours: str, of: type, *, bias: bool) -> None:
    table.add_linear(f"attn.{name}.0", f"{ours}.down", of=of)
    table.add_linear(f"attn.{name}.1", f"{ours}.up", of=of, bias=bias)


def _times(factor: float) -> Form:
    """Returns the form of a linear map that a layout has so many times as large."""
    return Form(lambda kernel: kernel.T * factor, lambda weight: weight.T / factor)
