"""Mamba without MLPs (modeling_mamba.py of transformers 5.24)."""

from __future__ import annotations

from typing import Any

from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.layouts.mamba2 import NAMES
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import TAPS, Tensor
from recollect.layers import Mamba
from recollect.layers.modules.norms import RMSNorm
from recollect.models import LanguageModel

CLASSES = {"mamba": "MambaForCausalLM"}


def fits(model: LanguageModel) -> bool:
    """Returns whether all mixers are Mamba's."""
    return shared.only(model, Mamba)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    mixer = shared.first(model, Mamba)
    require(type(model.norm) is RMSNorm, "model.norm", model.norm, "Mamba has RMSNorm")
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "hidden_size": model.width,
        "num_hidden_layers": len(model.mixers),
        "expand": mixer.expansion,
        "intermediate_size": mixer.expansion * model.width,
        "state_size": mixer.state,
        "conv_kernel": mixer.kernel,
        "time_step_rank": mixer.rank or -(-model.width // 16),
        "layer_norm_epsilon": model.norm.epsilon,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    for name, value in (("use_bias", False), ("use_conv_bias", True)):
        config.one_of(name, value, value)
    auto = config.fields.get("time_step_rank", "auto") == "auto"
    mixer = Mamba(
        state=config.whole("state_size", 16),
        expansion=config.whole("expand", 2),
        rank=None if auto else config.whole("time_step_rank"),
        kernel=config.whole("conv_kernel", 4),
    )
    layers = shared.stages([mixer] * config.whole("num_hidden_layers", 32))
    norm = RMSNorm(epsilon=config.number("layer_norm_epsilon", 1e-5))
    return shared.decoder(config, layers, mlp=None, norm=norm, tied=config.flag("tie_word_embeddings", True))


def tensors_of(model: LanguageModel, kind: str = "mamba") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model, NAMES, layer="backbone.layers.{}.")
    table.add_linear("mixer.in_proj", "mixer.input", "mixer.gate")
    table.add_layers("mixer.conv1d.weight", "mixer.convolution.taps", form=TAPS)
    table.add_layers("mixer.conv1d.bias", "mixer.convolution.bias")
    table.add_linear("mixer.x_proj", "mixer.step_down", "mixer.write", "mixer.read")
    table.add_linear("mixer.dt_proj", "mixer.step_up")
    table.add_layers("mixer.dt_proj.bias", "mixer.step_bias")
    table.add_layers("mixer.A_log", "mixer.log_rate")
    table.add_layers("mixer.D", "mixer.skip")
    table.add_linear("mixer.out_proj", "mixer.output")
    return table.tensors
