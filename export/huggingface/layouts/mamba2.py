"""Mamba-2 without MLPs (modeling_mamba2.py of transformers 5.24). B are our keys, C our queries, x our values."""

from __future__ import annotations

import math
from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import TAPS, TRANSPOSED, Tensor, shaped
from recollect.layers import Mamba2
from recollect.layers.modules.norms import RMSNorm
from recollect.models import LanguageModel

CLASSES = {"mamba2": "Mamba2ForCausalLM"}
HEAD_NORM_EPSILON = 1e-5
"""Of the norm before the output here, which the layout gives the epsilon of all its norms."""

NAMES = {"mixer_norm": "norm", "final": "backbone.norm_f", "embedding": "backbone.embeddings"}


def fits(model: LanguageModel) -> bool:
    """Returns whether all mixers are Mamba-2's."""
    return shared.only(model, Mamba2)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    mixer = shared.first(model, Mamba2)
    _, heads, state, dim = mixer.sizes(model.width)
    require(type(model.norm) is RMSNorm, "model.norm", model.norm, "Mamba-2 has RMSNorm")
    whole = heads * dim % model.width == 0
    require(whole, "value_dim", dim, f"Mamba-2's {heads} heads together have a multiple of the width {model.width}")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_act": "silu",
        "hidden_size": model.width,
        "num_hidden_layers": len(model.mixers),
        "num_heads": heads,
        "head_dim": dim,
        "expand": heads * dim // model.width,
        "state_size": state,
        "n_groups": mixer.key_heads,
        "conv_kernel": mixer.kernel,
        "layer_norm_epsilon": model.norm.epsilon,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    # Theirs is over the heads of each group, ours over all.
    config.one_of("n_groups", 8, 1)
    for name, value in (("use_bias", False), ("use_conv_bias", True)):
        config.one_of(name, value, value)
    limit = config.fields.get("time_step_limit")
    if limit not in (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]):
        raise UserError(f"{config.where}: time_step_limit={limit!r}: steps are not limited here")
    epsilon = config.number("layer_norm_epsilon", 1e-5)
    if epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: layer_norm_epsilon={epsilon}: the mixers' norm has {HEAD_NORM_EPSILON} here")
    mixer = Mamba2(
        heads=config.whole("num_heads", 128),
        key_heads=1,
        key_dim=config.whole("state_size", 128),
        value_dim=config.whole("head_dim", 64),
        kernel=config.whole("conv_kernel", 4),
    )
    layers = shared.stages([mixer] * config.whole("num_hidden_layers", 64))
    return shared.decoder(config, layers, mlp=None, norm=RMSNorm(epsilon=epsilon))


def tensors_of(model: LanguageModel, kind: str = "mamba2") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model, NAMES, layer="backbone.layers.{}.")
    _, heads, _, dim = shared.first(model, Mamba2).sizes(model.width)
    parts = ("value", "key", "query")
    inputs = ("mixer.gate.projection", *(f"mixer.{part}" for part in parts), "mixer.decay.projection")
    table.add_linear("mixer.in_proj", *inputs, form=TRANSPOSED)
    table.add_layers("mixer.conv1d.weight", *(f"mixer.convolutions.{part}.taps" for part in parts), form=TAPS)
    table.add_layers("mixer.conv1d.bias", *(f"mixer.convolutions.{part}.bias" for part in parts))
    table.add_layers("mixer.dt_bias", "mixer.decay.step_bias")
    table.add_layers("mixer.A_log", "mixer.decay.log_rate")
    table.add_layers("mixer.D", "mixer.skip.weight")
    table.add_layers("mixer.norm.weight", "mixer.gate.norm.gain", form=shaped((heads, dim), (heads * dim,)))
    table.add_linear("mixer.out_proj", "mixer.output")
    return table.tensors
