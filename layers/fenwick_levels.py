"""Recurrences whose past is read in buckets of growing size, each with a weight of its own (log-linear attention).

    o_t = sum_l lambda_t^(l) S_t^(l)^T q_t

S^(l) is the recurrence's state with only the tokens of level l written. The levels of token t are those of a Fenwick
tree: level 0 is the token itself, and level l > 0 the 2^(l-1) tokens that the binary digit l - 1 of t stands for, if it
is 1; together they are all tokens before t (Guo et al. 2025, "Log-linear attention"). Among every 2^l tokens the second
half reads the first: one recurrence per level, whose documents are spans of 2^l tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import check_length
from recollect.layers.modules.gates import in_fp32
from recollect.layers.modules.linear import parameter
from recollect.layers.recurrent import Stream
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.linear_recurrence.recurrence import by_channel, repeat_heads
from recollect.pallas_kernels.segments import segments_before


def longest(levels: int) -> int:
    """Returns the length of the longest document that these levels cover."""
    return 2 ** (levels - 1)


class LevelWeights(nnx.Module):
    """lambda_t^(l) = softplus(scale_l (W x_t)_l) per head, scale 1 at the start; the map is the caller's."""

    def __init__(self, heads: int, levels: int, projection: nnx.Module):
        self.projection = projection
        self.scale = parameter(jnp.ones((heads, levels)), "h r", decay=False)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h r"]:
        """Returns lambda, fp32."""
        scale, logits = self.scale[...], in_fp32(self.projection(x))
        return jax.nn.softplus(logits.reshape(*x.shape[:2], *scale.shape) * scale)


def recurrence_by_levels(
    stream: Stream,
    weights: Float[Array, "b t h r"],
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    **operands: Any,
) -> Float[Array, "b t h v"]:
    """Returns the weighted sum of what the levels read, in v's dtype; `operands` are those of `linear_recurrence`, each
    per token. A state per level above 0, "levels" (b, levels - 1, h, k, v), crosses to the next call."""
    b, t, h, value_dim = v.shape
    levels = weights.shape[3]
    check_length(t, longest(levels), f"what levels={levels} cover")
    index = stream.index(v)
    zeros = jax.ShapeDtypeStruct((b, levels - 1, h, k.shape[3], value_dim), jnp.float32)
    if stream.state is None:
        weights = weights[..., : (t - 1).bit_length() + 1]  # what no token has is left out
    above = stream.run("levels", zeros, _above_zero, index, weights[..., 1:], q, k, v, operands)
    strength = operands["write_strength"]
    now = jnp.sum(in_fp32(repeat_heads(q * k, h)), axis=-1) * operands.get("scale", 1.0) * strength * weights[..., 0]
    out = above + now[..., None] * v
    return jnp.where((index < longest(levels))[..., None, None], out, jnp.nan).astype(v.dtype)


def _above_zero(
    index: Int[Array, "b t"],
    weights: Float[Array, "b t h r"],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    operands: dict[str, Any],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b r h k v"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b r h k v"] | None]:
    """Returns the weighted sum over the levels from 1 on, fp32, and their states."""
    first = (
        jnp.zeros_like(index, dtype=bool)
        if segment_ids is None
        else segment_ids != segments_before(segment_ids, initial_segment)
    )
    real = jnp.ones_like(first) if segment_ids is None else segment_ids != 0

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def level(total: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array | None]:
        number, weight, state = xs
        begins = real & (first | (index % (1 << number) == 0))
        spans = jnp.where(real, 1 + jnp.cumsum(begins, axis=1), 0)
        reads = ((index >> (number - 1)) & 1)[..., None]
        o, state = linear_recurrence(
            q,
            k,
            v,
            **(operands | {"write_strength": operands["write_strength"] * (1 - reads)}),
            segment_ids=spans,
            initial_state=state,
            initial_segment=jnp.ones_like(spans[:, 0]),
            return_state=return_state,
        )
        return total + by_channel(weight * reads, total.dtype) * o, state

    numbers = jnp.arange(1, weights.shape[3] + 1)
    states = None if initial_state is None else jnp.moveaxis(initial_state, 1, 0)
    total, states = jax.lax.scan(level, in_fp32(jnp.zeros_like(v)), (numbers, jnp.moveaxis(weights, 3, 0), states))
    return total, None if states is None else jnp.moveaxis(states, 0, 1)
