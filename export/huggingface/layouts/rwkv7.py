"""RWKV-7 as the flash-linear-attention library has it (0.6; fla/models/rwkv7, fla/layers/rwkv7.py). Loads there once
`fla` is imported.

Its MLPs mix in the token before, which is written as numbers that switch it off, and a file with others is refused. So
are the first layer's values in later ones where `RWKV7.value_residual` is False.
"""

from __future__ import annotations

from typing import Any

import chz

from recollect.configuration import UserError
from recollect.export.huggingface.layouts import shared
from recollect.export.huggingface.requirements import HuggingFaceConfig, require
from recollect.export.huggingface.tensors import TRANSPOSED, LayerTensors, Tensor, shaped
from recollect.layers import RWKV7
from recollect.layers.modules import LayerNorm, SquaredReLU
from recollect.models import LanguageModel, repeat

CLASSES = {"rwkv7": "RWKV7ForCausalLM"}
EPSILON = 1e-5
"""Of the heads' norms here, over their dimensions; the layout has one for all norms."""
CLOSED, UNUSED_RANK = -1e4, 1
"""Bias of a sigmoid that is 0 in every dtype, and the rank of a map into one."""


def fits(model: LanguageModel) -> bool:
    """Returns whether all mixers are RWKV-7's."""
    return shared.only(model, RWKV7)


def _mixes_values(model: LanguageModel) -> bool:
    last = model.mixers[-1]
    return isinstance(last, RWKV7) and last.value_residual


def config_of(model: LanguageModel) -> dict[str, Any]:
    """Returns the fields of config.json."""
    norm, mlp, mixer = model.norm, model.mlp, shared.first(model, RWKV7)
    require(isinstance(norm, LayerNorm), "model.norm", norm, "rwkv7 has LayerNorm")
    require(isinstance(mlp, SquaredReLU), "model.mlp", mlp, "rwkv7 has SquaredReLU")
    assert isinstance(norm, LayerNorm) and mlp is not None
    _, heads, key_dim, value_dim = mixer.sizes(model.width)
    for name, dim in (("key_dim", key_dim), ("value_dim", value_dim)):
        require(heads * dim == model.width, name, dim, f"rwkv7 has {model.width} / heads")
    small, large, share = mixer.ranks(model.width)
    return {
        "architectures": [CLASSES["rwkv7"]],
        "model_type": "rwkv7",
        "hidden_act": "sqrelu",
        "hidden_size": model.width,
        "intermediate_size": mlp.inner(model.width),
        "num_hidden_layers": len(model.mixers),
        "head_dim": key_dim,
        "num_heads": heads,
        "decay_low_rank_dim": small,
        "a_low_rank_dim": small,
        "gate_low_rank_dim": large,
        "v_low_rank_dim": share if _mixes_values(model) else UNUSED_RANK,
        "norm_first": False,
        "norm_bias": norm.bias,
        "norm_eps": norm.epsilon,
        "fuse_norm": True,
        "fuse_cross_entropy": False,
    }


def model_of(config: HuggingFaceConfig) -> LanguageModel:
    """Returns the model of a config.json; raises UserError for a value that this project does not have."""
    for name, default, value in (("norm_first", True, False), ("hidden_act", "sqrelu", "sqrelu"), ("attn", None, None)):
        config.one_of(name, default, value)
    width, head_dim = config.whole("hidden_size"), config.whole("head_dim", 64)
    epsilon = config.number("norm_eps", EPSILON)
    if epsilon != EPSILON:
        raise UserError(f"{config.where}: norm_eps={epsilon}: the heads' norms have {EPSILON} here")
    if width % head_dim:
        raise UserError(f"{config.where}: head_dim={head_dim}: must divide hidden_size={width}")
    names = (("decay", 64), ("a", 64), ("gate", 128), ("v", 16))
    decay, strength, gate, share = (config.whole(f"{name}_low_rank_dim", rank) for name, rank in names)
    mixes = share != UNUSED_RANK
    first = RWKV7(heads=width // head_dim, rank=decay if decay == gate else None)
    small, large, of_values = first.ranks(width)
    if (decay, strength, gate) != (small, small, large) or (mixes and share != of_values):
        raise UserError(f"{config.where}: decay_low_rank_dim={decay}: ranks are equal here, or as published")
    layers, later = config.whole("num_hidden_layers", 24), chz.replace(first, value_residual=True)
    apart = mixes and layers > 1
    return LanguageModel(
        width=width,
        stages=repeat(first, depth=1) + repeat(later, depth=layers - 1) if apart else repeat(first, depth=layers),
        norm=LayerNorm(epsilon=epsilon, bias=config.flag("norm_bias", True)),
        mlp=SquaredReLU(hidden=config.whole("intermediate_size")),
        tied=config.flag("tie_word_embeddings", False),
    )


def tensors_of(model: LanguageModel, kind: str = "rwkv7") -> list[Tensor]:
    """Returns the table of tensors."""
    table, mixer = LayerTensors(model, "model.layers.{}."), shared.first(model, RWKV7)
    assert isinstance(model.norm, LayerNorm)
    _, heads, key_dim, _ = mixer.sizes(model.width)
    table.add("model.embeddings.weight", "embedding")
    for theirs, ours in (("weight", "gain"), ("bias", "bias"))[: 1 + model.norm.bias]:
        table.add_layers(f"attn_norm.{theirs}", f"mixer_norm.{ours}")
        table.add_layers(f"ffn_norm.{theirs}", f"mlp_norm.{ours}")
        table.add(f"model.norm.{theirs}", f"final_norm.{ours}")
    flat, mix = shaped((heads, key_dim), (heads * key_dim,)), shaped((model.width,), (1, 1, model.width))
    for letter in "rwkvag":
        table.add_layers(f"attn.x_{letter}", f"mixer.mixes.{letter}.mix", form=mix)
    for letter, ours in (("r", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        table.add_linear(f"attn.{letter}_proj", f"mixer.{ours}")
    for letter, ours in (("w", "decay"), ("a", "strength"), ("g", "gate")):
        table.add_linear(f"attn.{letter}_lora.lora.0", f"mixer.{ours}.down")
        table.add_linear(f"attn.{letter}_lora.lora.2", f"mixer.{ours}.up", bias=letter != "g")
    table.add_layers("attn.k_k", "mixer.erase_scale", form=flat)
    table.add_layers("attn.k_a", "mixer.key_scale", form=flat)
    table.add_layers("attn.r_k", "mixer.bonus")
    for theirs, ours in (("weight", "gain"), ("bias", "bias")):
        table.add_layers(f"attn.g_norm.{theirs}", f"mixer.norm.{ours}", form=flat)
    table.add_linear("ffn.key", "mlp.up")
    table.add_linear("ffn.value", "mlp.down")
    table.add_constant("ffn.x_k", (model.width,), exact=True)
    if _mixes_values(model):
        table.add_linear("attn.v_lora.lora.0", "mixer.value_share.down", of=model.mixers[-1])
        table.add_linear("attn.v_lora.lora.2", "mixer.value_share.up", of=model.mixers[-1], bias=True)
    else:
        table.add_constant("attn.v_lora.lora.0.weight", (UNUSED_RANK, model.width), first=1)
        table.add_constant("attn.v_lora.lora.2.weight", (model.width, UNUSED_RANK), first=1, exact=True)
        table.add_constant("attn.v_lora.lora.2.bias", (model.width,), CLOSED, first=1, exact=True)
    if not model.tied:
        table.add("lm_head.weight", "head.kernel", TRANSPOSED)
    return table.tensors
