"""Gated DeltaNet and gated attention as Qwen3.5 (written and read) and as Qwen3-Next without experts (read), which has
the projections of each key head side by side (modeling_qwen3_5.py, modeling_qwen3_next.py of transformers 5.24).

Both store the distance of a gain from 1, but for that of Gated DeltaNet's own norm.
"""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import CENTRED, TAPS, Tensor
from recollect.layers import GatedAttention, GatedDeltaNet
from recollect.models import LanguageModel

CLASSES = {"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_next": "Qwen3NextForCausalLM"}
HEAD_NORM_EPSILON = 1e-6
"""Of the norms of queries and keys here, which the layouts give the epsilon of all norms."""
TYPES: dict[type, str] = {GatedDeltaNet: "linear_attention", GatedAttention: "full_attention"}


def fits(model: LanguageModel) -> bool:
    """Returns whether the mixers are Gated DeltaNet's and gated attention's."""
    return shared.only(model, GatedDeltaNet, GatedAttention) or shared.only(model, GatedAttention)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    linear = shared.first(model, GatedDeltaNet)
    key_heads, heads, key_dim, value_dim = linear.sizes(model.width)
    bias = shared.first(model, GatedAttention).bias
    require(not bias, "bias", bias, "Qwen3.5's gates have one with that of queries")
    return {
        **shared.decoder_fields(model, "qwen3_5_text", CLASSES["qwen3_5_text"]),
        **shared.attention_fields(shared.first(model, GatedAttention), model.width),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": linear.kernel,
        "layer_types": shared.layer_types(model, TYPES),
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    epsilon = config.number("rms_norm_eps", 1e-6)
    if epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: rms_norm_eps={epsilon}: query and key norms have {HEAD_NORM_EPSILON} here")
    if config.fields["model_type"] == "qwen3_next" and config.fields.get("num_experts", 512) != 0:
        raise UserError(f"{config.where}: num_experts: this project has no mixtures of MLPs; 0 is without")
    config.one_of("attention_bias", False, False)
    linear = GatedDeltaNet(
        key_heads=config.whole("linear_num_key_heads", 16),
        heads=config.whole("linear_num_value_heads", 32),
        key_dim=config.whole("linear_key_head_dim", 128),
        value_dim=config.whole("linear_value_head_dim", 128),
        kernel=config.whole("linear_conv_kernel_dim", 4),
        norm_epsilon=epsilon,
    )
    attention = GatedAttention(query_key_norm=True, **shared.attention_of(config, fraction=0.25, head_dim=256))
    mixers = {TYPES[type(mixer)]: mixer for mixer in (linear, attention)}
    every = config.whole("full_attention_interval", 4)

    def default(layers: int) -> list[str]:
        return ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)]

    return shared.decoder(config, shared.typed_layers(config, "layer_types", mixers, default))


def tensors_of(model: LanguageModel, kind: str) -> list[Tensor]:
    """Returns the table of tensors of `model` in the layout `kind`."""
    table = shared.decoder_tensors(model, gain=CENTRED)
    linear, attention = shared.first(model, GatedDeltaNet), shared.first(model, GatedAttention)
    of: Any = GatedDeltaNet
    parts = ("query", "key", "value")
    inputs = [f"mixer.{part}" for part in parts]
    gate, strength, decay = "mixer.gate.projection", "mixer.strength.projection", "mixer.decay.projection"
    if kind == "qwen3_next":
        groups = linear.key_heads or linear.heads
        table.add_linear("linear_attn.in_proj_qkvz", *inputs, gate, of=of, groups=groups)
        table.add_linear("linear_attn.in_proj_ba", strength, decay, of=of, groups=groups)
    else:
        table.add_linear("linear_attn.in_proj_qkv", *inputs, of=of)
        for letter, ours in (("z", gate), ("b", strength), ("a", decay)):
            table.add_linear(f"linear_attn.in_proj_{letter}", ours, of=of)
    taps = [f"mixer.convolutions.{part}.taps" for part in parts]
    table.add_layers("linear_attn.conv1d.weight", *taps, of=of, form=TAPS)
    table.add_layers("linear_attn.dt_bias", "mixer.decay.step_bias", of=of)
    table.add_layers("linear_attn.A_log", "mixer.decay.log_rate", of=of)
    table.add_layers("linear_attn.norm.weight", "mixer.gate.norm.gain", of=of)
    table.add_linear("linear_attn.out_proj", "mixer.output", of=of)
    shared.attention_tensors(table, GatedAttention, gain=CENTRED)
    # The gate is projected with the queries, beside them in each head.
    table.tensors = [tensor for tensor in table.tensors if not tensor.name.endswith("self_attn.q_proj.weight")]
    table.add_linear("self_attn.q_proj", "mixer.query", gate, of=GatedAttention, groups=attention.heads)
    return table.tensors
