"""Kimi Delta Attention and latent attention without positions as Kimi Linear, with dense MLPs (modeling_kimi_linear.py
of transformers 5.24), under the names of published checkpoints, which transformers writes and reads, too."""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import TAPS, Tensor, shaped
from recollect.layers import KimiDeltaAttention, LatentAttention
from recollect.models import LanguageModel

CLASSES = {"kimi_linear": "KimiLinearForCausalLM"}
RENAMED = {".block_sparse_moe.": ".mlp."}
"""What transformers calls dense MLPs, too, when it saves a model."""
HEAD_NORM_EPSILON = 1e-5
"""Of the norm before the output here, which the layout gives the epsilon of its norms."""
TYPES: dict[type, str] = {KimiDeltaAttention: "linear_attention", LatentAttention: "full_attention"}


def fits(model: LanguageModel) -> bool:
    """Returns whether the mixers are Kimi Delta Attention's and latent attention's."""
    linear = shared.only(model, KimiDeltaAttention, LatentAttention)
    # Alone and with biases of gates it is flash-linear-attention's.
    return linear and not (shared.only(model, KimiDeltaAttention) and shared.first(model, KimiDeltaAttention).gate_bias)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    linear, latent = shared.first(model, KimiDeltaAttention), shared.first(model, LatentAttention)
    _, heads, key_dim, value_dim = linear.sizes(model.width)
    same = key_dim == value_dim
    require(same, "value_dim", value_dim, f"Kimi Linear has as many dimensions as keys, {key_dim}")
    return {
        **shared.decoder_fields(model, "kimi_linear", CLASSES["kimi_linear"]),
        "num_attention_heads": latent.heads,
        "num_key_value_heads": latent.heads,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "qk_nope_head_dim": latent.key_dim or model.width // latent.heads,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim or model.width // latent.heads,
        "linear_num_heads": heads,
        "linear_head_dim": key_dim,
        "linear_conv_kernel_dim": linear.kernel,
        "layer_types": shared.layer_types(model, TYPES),
        "mlp_layer_types": ["dense"] * len(model.mixers),
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    epsilon = config.number("rms_norm_eps", 1e-5)
    if epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: rms_norm_eps={epsilon}: the mixers' norm has {HEAD_NORM_EPSILON} here")
    config.one_of("attention_bias", False, False)
    layers = config.whole("num_hidden_layers", 27)
    dense = config.fields.get("mlp_layer_types")
    if dense is None:
        dense = ["dense"] * config.whole("first_k_dense_replace", 1)
    if not isinstance(dense, list) or dense.count("dense") < layers:
        raise UserError(f"{config.where}: mlp_layer_types: this project has no mixtures of MLPs; all must be 'dense'")
    nested = config.table("linear_attn_config")
    of = HuggingFaceConfig({**config.fields, **{_NESTED[name]: nested[name] for name in _NESTED if name in nested}}, "")
    of.where = config.where
    dim = of.whole("linear_head_dim", 128)
    rank = config.fields.get("q_lora_rank")
    linear = KimiDeltaAttention(
        heads=of.whole("linear_num_heads", 32),
        key_dim=dim,
        value_dim=dim,
        kernel=of.whole("linear_conv_kernel_dim", 4),
        gate_bias=False,
    )
    latent = LatentAttention(
        heads=config.whole("num_attention_heads", 32),
        rank=config.whole("kv_lora_rank", 512),
        query_rank=None if rank is None else config.whole("q_lora_rank"),
        key_dim=config.whole("qk_nope_head_dim", 128),
        value_dim=config.whole("v_head_dim", 128),
        rotary_dim=config.whole("qk_rope_head_dim", 64),
        positions=None,
    )
    mixers = {TYPES[type(mixer)]: mixer for mixer in (linear, latent)}

    def default(layers: int) -> list[str]:
        return ["full_attention" if layer and layer % 4 == 0 else "linear_attention" for layer in range(layers)]

    return shared.decoder(config, shared.typed_layers(config, "layer_types", mixers, default))


_NESTED = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
_NESTED |= {"short_conv_kernel_size": "linear_conv_kernel_dim"}


def tensors_of(model: LanguageModel, kind: str = "kimi_linear") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model)
    linear, latent = shared.first(model, KimiDeltaAttention), shared.first(model, LatentAttention)
    _, heads, dim, _ = linear.sizes(model.width)
    of: Any = KimiDeltaAttention
    parts = ("query", "key", "value")
    for part in parts:
        table.add_linear(f"self_attn.{part[0]}_proj", f"mixer.{part}", of=of)
        taps = f"mixer.convolutions.{part}.taps"
        table.add_layers(f"self_attn.{part[0]}_conv1d.weight", taps, of=of, form=TAPS)
    bias, rate = shaped((heads, dim), (heads * dim,)), shaped((heads,), (1, 1, heads, 1))
    table.add_layers("self_attn.dt_bias", "mixer.decay.step_bias", of=of, form=bias)
    table.add_layers("self_attn.A_log", "mixer.decay.log_rate", of=of, form=rate)
    for theirs, ours in (("f", "decay"), ("g", "gate")):
        table.add_linear(f"self_attn.{theirs}_a_proj", f"mixer.{ours}.projection.down", of=of)
        table.add_linear(f"self_attn.{theirs}_b_proj", f"mixer.{ours}.projection.up", of=of)
    table.add_linear("self_attn.b_proj", "mixer.strength.projection", of=of)
    table.add_layers("self_attn.o_norm.weight", "mixer.gate.norm.gain", of=of)
    table.add_linear("self_attn.o_proj", "mixer.output", of=of)
    of = LatentAttention
    if latent.query_rank is None:
        table.add_linear("self_attn.q_proj", "mixer.query", of=of)
    else:
        table.add_linear("self_attn.q_a_proj", "mixer.query_down", of=of)
        table.add_layers("self_attn.q_a_layernorm.weight", "mixer.query_norm.gain", of=of)
        table.add_linear("self_attn.q_b_proj", "mixer.query", of=of)
    table.add_linear("self_attn.kv_a_proj_with_mqa", "mixer.down", "mixer.shared_key", of=of)
    table.add_layers("self_attn.kv_a_layernorm.weight", "mixer.norm.gain", of=of)
    table.add_linear("self_attn.kv_b_proj", "mixer.key_up", "mixer.value_up", of=of, groups=latent.heads)
    table.add_linear("self_attn.o_proj", "mixer.output", of=of)
    return table.tensors
