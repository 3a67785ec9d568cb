"""Differential attention without a gain as DiffLlama (modeling_diffllama.py of transformers 5.24), which has the first
maps of all heads, then the second ones, and halves of values likewise."""

from __future__ import annotations

from typing import Any

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig
from recollect.export.huggingface.tensors import Form, Tensor
from recollect.layers import DifferentialAttention
from recollect.models import LanguageModel

CLASSES = {"diffllama": "DiffLlamaForCausalLM"}
HEAD_NORM_EPSILON = 1e-5
"""Of the norm of the difference here, which the layout gives the epsilon of all norms."""


def fits(model: LanguageModel) -> bool:
    """Returns whether all mixers are differential attention."""
    return shared.only(model, DifferentialAttention)


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json, which count maps: two per head, of half its dimensions."""
    fields = shared.attention_fields(shared.first(model, DifferentialAttention), model.width)
    fields["head_dim"] //= 2
    for name in ("num_attention_heads", "num_key_value_heads"):
        fields[name] *= 2
    return {**shared.decoder_fields(model, "diffllama", CLASSES["diffllama"]), **fields}


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    epsilon = config.number("rms_norm_eps", 1e-5)
    if epsilon != HEAD_NORM_EPSILON:
        raise UserError(f"{config.where}: rms_norm_eps={epsilon}: the mixers' norm has {HEAD_NORM_EPSILON} here")
    fields = shared.attention_of(config)
    for name in ("heads", "key_heads"):
        if fields[name] % 2:
            raise UserError(f"{config.where}: {fields[name]} {name}: differential attention has pairs of maps")
        fields[name] //= 2
    fields["head_dim"] *= 2
    mixer = DifferentialAttention(gain=False, **fields)
    return shared.decoder(config, shared.stages([mixer] * config.whole("num_hidden_layers", 16)))


def tensors_of(model: LanguageModel, kind: str = "diffllama") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model)
    mixer = shared.first(model, DifferentialAttention)
    pairs = mixer.key_heads or mixer.heads
    weight, bias = _maps(pairs, transposed=True), _maps(pairs, transposed=False)
    for part in ("query", "key", "value"):
        table.add_layers(f"self_attn.{part[0]}_proj.weight", f"mixer.{part}.kernel", form=weight)
        if mixer.bias:
            table.add_layers(f"self_attn.{part[0]}_proj.bias", f"mixer.{part}.bias", form=bias)
    table.add_linear("self_attn.o_proj", "mixer.output", bias=mixer.bias)
    for row, name in enumerate(("q1", "k1", "q2", "k2")):
        table.add_layers(f"self_attn.lambda_{name}", "mixer.vectors", row=row)
    return table.tensors


def _maps(pairs: int, transposed: bool) -> Form:
    """Returns the form of what is (key head, map, rest) here along its last axis, and (map, key head, rest) there."""

    def swap(array: Any, first: int) -> Any:
        split = array.reshape(*array.shape[:-1], first, 2 * pairs // first, -1)
        return split.swapaxes(-3, -2).reshape(array.shape)

    if transposed:
        return Form(lambda array: swap(array, pairs).T, lambda array: swap(array.T, 2))
    return Form(lambda array: swap(array, pairs), lambda array: swap(array, 2))
