"""Lightning and softmax attention as MiniMax of one expert (modeling_minimax.py of transformers 5.24): what mixers and
MLPs return is added to the normalised stream (`LanguageModel.residual`).

Decays are stored, as here and by block. Read are those of the layer's place: transformers divides it by L - 1 + 1e-5,
not by L - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import Tensor, shaped
from recollect.layers import Attention, Lightning
from recollect.layers.modules import Rotary, alibi_slopes
from recollect.models import LanguageModel

CLASSES = {"minimax": "MiniMaxForCausalLM"}
BLOCK = 256
"""Tokens of a block there, whose decays are stored."""
NAMES = {"gate": "block_sparse_moe.experts.0.w1", "up": "block_sparse_moe.experts.0.w3"}
NAMES = {**shared.LLAMA_NAMES, **NAMES, "down": "block_sparse_moe.experts.0.w2"}
TYPES: dict[type, str] = {Lightning: "linear_attention", Attention: "full_attention"}
FACTORS = [f"{part}_{name}_factor" for part in ("full_attn", "linear_attn", "mlp") for name in ("alpha", "beta")]


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    for number, mixer in enumerate(model.mixers):
        require(type(mixer) in TYPES, f"layer {number}: mixer", mixer, "MiniMax has Lightning and Attention")
    linear, attention = shared.first(model, Lightning), shared.first(model, Attention)
    if Lightning not in map(type, model.mixers):
        linear = Lightning(heads=attention.heads, key_dim=attention.head_dim, value_dim=attention.head_dim)
    if Attention not in map(type, model.mixers):
        attention = Attention(heads=linear.heads, head_dim=linear.key_dim, positions=Rotary())
    _, heads, key_dim, value_dim = linear.sizes(model.width)
    shape = (heads, key_dim, value_dim)
    head_dim = attention.head_width(model.width)
    same = shape == (attention.heads, head_dim, head_dim)
    require(same, "heads, key_dim, value_dim", shape, f"attention has {attention.heads} heads of {head_dim}")
    return {
        **shared.decoder_fields(model, "minimax", CLASSES["minimax"]),
        **shared.attention_fields(attention, model.width),
        "block_size": BLOCK,
        "layer_types": shared.layer_types(model, TYPES),
        "num_experts_per_tok": 1,
        "num_local_experts": 1,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    for name, missing in (("num_local_experts", 8), ("num_experts_per_tok", 2)):
        config.one_of(name, missing, 1)
    config.one_of("block_size", BLOCK, BLOCK)
    config.one_of("sliding_window", None, None)
    if factor := next((name for name in FACTORS if config.number(name, 1.0) != 1), None):
        raise UserError(f"{config.where}: {factor}={config.fields[factor]}: nothing is scaled before it is added here")
    attention = Attention(**shared.attention_of(config, base=1e6))
    if attention.heads & (attention.heads - 1):
        raise UserError(f"{config.where}: num_attention_heads={attention.heads}: its decays are those of 2^n heads")
    linear = Lightning(heads=attention.heads, key_dim=attention.head_dim, value_dim=attention.head_dim)

    def default(layers: int) -> list[str]:
        return ["linear_attention" if layer % 2 else "full_attention" for layer in range(layers)]

    mixers = {TYPES[type(mixer)]: mixer for mixer in (linear, attention)}
    layers = shared.typed_layers(config, "layer_types", mixers, default)
    return shared.decoder(config, layers, residual="normalised")


def tensors_of(model: LanguageModel, kind: str = "minimax") -> list[Tensor]:
    """Returns the table of tensors."""
    table = shared.decoder_tensors(model, NAMES)
    table.add_constant("block_sparse_moe.gate.weight", (1, model.width))
    shared.attention_tensors(table, Attention)
    _, heads, _, dim = shared.first(model, Lightning).sizes(model.width)
    of: Any = Lightning
    parts = ("mixer.query", "mixer.key", "mixer.value")
    table.add_linear("self_attn.qkv_proj", *parts, of=of, groups=heads)
    table.add_linear("self_attn.output_gate", "mixer.gate.projection", of=of)
    table.add_linear("self_attn.out_proj", "mixer.output", of=of)
    table.add_layers("self_attn.norm.weight", "mixer.gate.norm.gain", of=of, form=shaped((heads, dim), (heads * dim,)))
    for number, mixer in enumerate(model.mixers):
        if type(mixer) is Lightning:
            for name, value in _decays(heads, number / max(len(model.mixers) - 1, 1)).items():
                whole = f"model.layers.{number}.self_attn.{name}"
                table.tensors.append(Tensor(whole, (), constant=(value.shape, value)))
    return table.tensors


def _decays(heads: int, share: float) -> dict[str, np.ndarray]:
    """Returns what the layout stores of a layer's decays: rates, decays from a block's start, to its end, and between
    its tokens."""
    rates = np.asarray(alibi_slopes(heads), float)[:, None, None] * (1 - share + 1e-5)
    places = np.arange(1, BLOCK + 1)[:, None]
    back = places - places.T
    between = np.where(back >= 0, np.exp(-rates * np.maximum(back, 0)), 0)[None]
    decays = {"query_decay": np.exp(-rates * places), "key_decay": np.exp(-rates * (BLOCK - places))}
    return {"slope_rate": rates, **decays, "diagonal_decay": between}
