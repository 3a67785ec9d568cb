"""A few queries against many keys (decoding): keys and values are read once, where they are stored, as in plain
attention.

What landmark blocks need is done to scores: they are gathered block by block for the inner softmaxes, and each key's
weight is exp(s + a), with a = -lse for the query's current block and log P_b - (log-sum-exp within b) for a previous
block b.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.key_schedule import block_of, complete_blocks


def few_queries(
    q, k, v, query_positions, query_segments, key_positions, key_segments, *, block, scale
) -> tuple[jax.Array, jax.Array]:
    """Attends from q (b, t, g, r, k) to k (b, s, g, k) and v (b, s, g, v), fields (b, t) and (b, s): o (b, t, g, r, v)
    and lse (b, t, g, r), fp32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    b, s = key_positions.shape
    c = block + 1
    blocks = complete_blocks(key_positions, key_segments, c)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=wide) * scale

    real = (query_segments != 0)[:, :, None]
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & real
    i, j = query_positions[:, :, None], key_positions[:, None, :]
    current = same & (j <= i) & (i // c == j // c) & (j % c != block)
    seen = (
        blocks.exists[:, None]
        & (query_segments[:, :, None] == blocks.segment[:, None, :])
        & real
        & (blocks.number[:, None, :] < i // c)
    )

    inside = jnp.minimum(blocks.start[:, :, None] + jnp.arange(c), s - 1)
    by_block = _take(scores, inside.reshape(b, -1)).reshape(*scores.shape[:-1], -1, c)
    inner = jax.nn.logsumexp(by_block[..., :block], axis=-1)
    gates = jnp.where(_spread(seen), by_block[..., block], -jnp.inf)
    parts = (gates, jnp.where(_spread(current), scores, -jnp.inf))
    high = jnp.maximum(jnp.maximum(*(jnp.max(x, axis=-1) for x in parts)), jnp.finfo(wide).min)
    high = jax.lax.stop_gradient(high)
    total = sum(jnp.sum(jnp.exp(x - high[..., None]), axis=-1) for x in parts)
    some = total > 0
    lse = (high + jnp.log(jnp.where(some, total, 1)))[..., None]

    window, complete = block_of(key_positions, blocks, c)
    ordinary = complete & (key_positions % c != block)
    factors = _take(gates - lse - inner, window)
    added = jnp.where(_spread(current), -lse, jnp.where(ordinary[:, None, None, None], factors, -jnp.inf))
    weights = jnp.exp(jnp.where(added > -jnp.inf, scores, 0) + added)
    o = jnp.einsum("bgrts,bsgv->btgrv", weights.astype(v.dtype), v, preferred_element_type=wide)
    return o, jnp.moveaxis(jnp.where(some, lse[..., 0], -jnp.inf), 3, 1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x (b, g, r, t, m) at index (b, l) of the last dimension."""
    return jnp.take_along_axis(x, index[:, None, None, None], axis=-1, mode="promise_in_bounds")


def _spread(x: jax.Array) -> jax.Array:
    """Returns (b, 1, 1, t, m) of (b, t, m)."""
    return x[:, None, None]
