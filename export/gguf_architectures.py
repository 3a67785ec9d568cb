"""What llama.cpp calls the layouts of transformers, and where it has their sizes and tensors in another form.

Source: gguf 0.19.0, constants.py and tensor_mapping.py; of llama.cpp conversion/qwen.py, kimi_linear.py and mamba.py,
and what src/models/ requires of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from recollect.configuration import UserError

Fields = dict[str, Any]
Named = Iterator[tuple[str, np.ndarray]]
"""Names as transformers has them, or as `gguf.TensorNameMap` knows them, with arrays."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
      name: there.
      metadata: returns its sizes, by key without the name, from the fields of config.json; raises UserError for what
        it cannot express.
      stored: yields what it has in place of one tensor of transformers, from its name, its array and the fields.
    """

    name: str
    metadata: Callable[[Fields], dict[str, Any]]
    stored: Callable[[str, np.ndarray, Fields], Named]


def _require(holds: bool, field: str, value: Any, fields: Fields, reason: str) -> None:
    if not holds:
        name = ARCHITECTURES[fields["model_type"]].name
        raise UserError(f"{field}={value} stands in the way of a GGUF file: llama.cpp's {name} has {reason}")


def _require_both_kinds(fields: Fields) -> None:
    """Their memory has two parts, and llama.cpp aborts where one is empty."""
    types = fields["layer_types"]
    both = len(set(types)) == 2
    _require(both, "model.stages", types[0], fields, "layers of both kinds, linear_attention and full_attention")


def _decoder(fields: Fields) -> dict[str, Any]:
    return {
        "embedding_length": fields["hidden_size"],
        "block_count": fields["num_hidden_layers"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": fields["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
    }


def _attention(fields: Fields) -> dict[str, Any]:
    _require(not fields.get("use_sliding_window"), "window", fields.get("sliding_window"), fields, "no windows")
    _require(fields["model_type"] == "llama" or not fields["attention_bias"], "bias", True, fields, "no biases")
    dim = fields["head_dim"]
    return {
        **_decoder(fields),
        "attention.head_count_kv": fields["num_key_value_heads"],
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": int(dim * fields.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(fields["rope_theta"]),
    }


def _plain(name: str, array: np.ndarray, fields: Fields) -> Named:
    yield name, array


def _llama(name: str, array: np.ndarray, fields: Fields) -> Named:
    """Rows of queries and keys in the order that llama.cpp rotates: pairs of dimensions side by side."""
    counts = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    if (heads := counts.get(name.split(".")[-2])) is not None:
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    yield name, array


def _qwen35_metadata(fields: Fields) -> dict[str, Any]:
    heads = fields["linear_num_value_heads"]
    key_dim, value_dim = fields["linear_key_head_dim"], fields["linear_value_head_dim"]
    _require_both_kinds(fields)
    _require(value_dim == key_dim, "value_dim", value_dim, fields, f"as many dimensions as of keys, {key_dim}")
    metadata = _attention(fields)
    pairs = metadata["rope.dimension_count"] // 2
    return {
        **metadata,
        # Positions of text are the same in three dimensions, which take turns over the rotated pairs.
        "rope.dimension_sections": [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0],
        "full_attention_interval": _interval(fields),
        "ssm.conv_kernel": fields["linear_conv_kernel_dim"],
        "ssm.state_size": key_dim,
        "ssm.group_count": fields["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * value_dim,
    }


def _interval(fields: Fields) -> int:
    """Returns n where each n-th layer, and no other, is attention."""
    attention = [kind == "full_attention" for kind in fields["layer_types"]]
    interval = attention.index(True) + 1
    regular = attention == [layer % interval == 0 for layer in range(1, len(attention) + 1)]
    _require(regular, "model.stages", fields["layer_types"], fields, "attention in each n-th layer and in no other")
    return interval


def _qwen35(name: str, array: np.ndarray, fields: Fields) -> Named:
    """Gains whole; value heads take turns over the key heads, which transformers has with theirs side by side."""
    if ".linear_attn." not in name:
        yield name, array + 1 if name.endswith("norm.weight") else array
        return
    keys, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    before = 2 * keys * fields["linear_key_head_dim"]

    def by_turns(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(keys, heads // keys, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    part = name.split(".linear_attn.")[1].split(".")[0]
    if part in ("in_proj_qkv", "conv1d"):
        array = np.concatenate([array[:before], by_turns(array[before:])])
    elif part == "out_proj":
        array = by_turns(array.T).T
    elif part != "norm":
        array = by_turns(array)
    yield from _recurrent(name, array, fields)


def _recurrent(name: str, array: np.ndarray, fields: Fields) -> Named:
    """A instead of its logarithm, taps as (features, width), and the bias of the step under the name of its map."""
    if name.endswith(".A_log"):
        array = -np.exp(array)
    elif name.endswith(".conv1d.weight"):
        array = array[:, 0]
    yield name.replace(".dt_bias", ".dt_proj.bias"), array


def _kimi_metadata(fields: Fields) -> dict[str, Any]:
    heads, layers, rank = fields["num_attention_heads"], fields["num_hidden_layers"], fields["kv_lora_rank"]
    _require_both_kinds(fields)
    linear = fields["linear_num_heads"]
    _require(linear == heads, "heads", linear, fields, f"as many in all layers, and latent attention has {heads}")
    _require(fields["q_lora_rank"] is None, "query_rank", fields["q_lora_rank"], fields, "no latent queries")
    return {
        **_decoder(fields),
        # A layer without key heads is Kimi Delta Attention to llama.cpp; latent attention has one, its latent vectors.
        "attention.head_count_kv": [int(kind == "full_attention") for kind in fields["layer_types"]],
        "attention.key_length": rank + fields["qk_rope_head_dim"],
        "attention.value_length": rank,
        "attention.key_length_mla": fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
        "attention.value_length_mla": fields["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": fields["qk_rope_head_dim"],
        "ssm.conv_kernel": fields["linear_conv_kernel_dim"],
        "kda.head_dim": fields["linear_head_dim"],
        # Experts, of which there are none, have sizes that a file must state.
        "leading_dense_block_count": layers,
        "expert_feed_forward_length": fields["intermediate_size"],
        "expert_shared_count": 0,
        "expert_weights_scale": 1.0,
        "expert_gating_func": 2,
    }


def _kimi(name: str, array: np.ndarray, fields: Fields) -> Named:
    """Keys' and values' maps of latent attention apart, per head, the keys' transposed."""
    if name.endswith("kv_b_proj.weight"):
        key_dim = fields["qk_nope_head_dim"]
        both = array.reshape(fields["num_attention_heads"], key_dim + fields["v_head_dim"], -1)
        yield name.replace("kv_b_proj", "k_b_proj"), both[:, :key_dim].swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), both[:, key_dim:]
    elif name.endswith("_conv1d.weight"):
        yield name, array[None]
    else:
        yield from _recurrent(name, array, fields)


def _mamba_sizes(fields: Fields, inner: int) -> dict[str, Any]:
    return {
        "embedding_length": fields["hidden_size"],
        "block_count": fields["num_hidden_layers"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": fields["layer_norm_epsilon"],
        "ssm.conv_kernel": fields["conv_kernel"],
        "ssm.state_size": fields["state_size"],
        "ssm.inner_size": inner,
    }


def _mamba_metadata(fields: Fields) -> dict[str, Any]:
    _require(fields["expand"] == 2, "expansion", fields["expand"], fields, "2")
    rank = {"ssm.time_step_rank": fields["time_step_rank"], "ssm.dt_b_c_rms": False}
    return _mamba_sizes(fields, fields["intermediate_size"]) | rank


def _mamba2_metadata(fields: Fields) -> dict[str, Any]:
    heads, state = fields["num_heads"], fields["state_size"]
    inner = heads * fields["head_dim"]
    _require(inner % state == 0, "key_dim", state, fields, f"a divisor of the dimensions of all values, {inner}")
    return _mamba_sizes(fields, inner) | {"ssm.time_step_rank": heads, "ssm.group_count": fields["n_groups"]}


def _mamba2(name: str, array: np.ndarray, fields: Fields) -> Named:
    if name.endswith((".A_log", ".D")):
        array = array[:, None]
    elif name.endswith(".mixer.norm.weight"):
        array = array.reshape(fields["n_groups"], -1)
    yield from _recurrent(name, array, fields)


ARCHITECTURES = {
    "llama": Architecture("llama", _attention, _llama),
    "qwen3": Architecture("qwen3", _attention, _plain),
    "qwen3_5_text": Architecture("qwen35", _qwen35_metadata, _qwen35),
    "kimi_linear": Architecture("kimi-linear", _kimi_metadata, _kimi),
    "mamba": Architecture("mamba", _mamba_metadata, _recurrent),
    "mamba2": Architecture("mamba2", _mamba2_metadata, _mamba2),
}
"""By `model_type` of transformers."""
