"""The probability mass that each key gets from chosen queries: a second pass of softmax attention, from the
log-sum-exp of the first.

    m_j = sum over chosen i of [j seen by i] exp(s_ij - lse_i),   s_ij = scale q_i . k_j + bias_ij

What evicts keys by attention needs (H2O, Zhang et al. 2023, section 4; SnapKV, Li et al. 2024, section 3), without the
array of all pairs: queries are taken a block at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.chunking import in_parts_with_sums
from recollect.pallas_kernels.masks import Mask, TokenFields

BLOCK = 128
"""Queries whose scores are in memory at once."""


def key_mass(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    lse: Float[Array, "b t h"],
    *,
    mask: Mask,
    query_fields: TokenFields,
    key_fields: TokenFields,
    rows: Int[Array, "b n"] | None = None,
    bias: Float[Array, "#b #h t s"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b h s"]:
    """Computes the mass of each key per query head, fp32.

    Args:
      lse: of all keys that the queries saw, also of those that are not among `k`.
      mask: which keys a query sees.
      query_fields, key_fields: (b, t) and (b, s); segment 0 is padding.
      rows: indices of the queries that count, -1 for none; None: all.
      bias: of the scores; -inf hides a key.
      scale: of the scores; None is k^(-1/2).
    """
    if rows is not None:
        index = jnp.maximum(rows, 0)
        q, lse = (jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1) for x in (q, lse))
        query_fields = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), query_fields)
        query_fields = TokenFields(**{**vars(query_fields), "segments": jnp.where(rows < 0, 0, query_fields.segments)})
        if bias is not None:
            shape = (index.shape[0], *bias.shape[1:])
            bias = jnp.take_along_axis(jnp.broadcast_to(bias, shape), index[:, None, :, None], axis=2)
    (b, _, h, dim), (s, groups) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale

    def step(mass: jax.Array, part: tuple) -> tuple[jax.Array, jax.Array]:
        q, lse, fields, bias = part
        wide = jnp.promote_types(q.dtype, jnp.float32)
        grouped = q.reshape(b, -1, groups, h // groups, dim)
        scores = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=wide).reshape(b, h, -1, s) * scale
        scores = scores if bias is None else scores + jnp.moveaxis(bias, 1, 2)
        lse = jnp.moveaxis(lse, 2, 1)[..., None]
        seen = mask.dense(fields, key_fields)[:, None] & (lse > -jnp.inf)
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse, 0)), 0)
        return mass + jnp.sum(weights, axis=2, dtype=jnp.float32), fields.segments

    arrays = (q, lse, query_fields, None if bias is None else jnp.moveaxis(bias, 2, 1))
    return in_parts_with_sums(step, jnp.zeros((b, h, s), jnp.float32), arrays, BLOCK)[0]
