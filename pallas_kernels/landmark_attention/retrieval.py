"""Landmark attention with retrieval: each query and head reads its own block and the top k of the earlier ones, by landmark score.

Which blocks are read is defined a query, so it does not depend on how a prompt was split. Keys come unrotated, because a block's
position depends on the query (stingy positions; Mohtashami & Jaggi 2023, section 3.2): with c = block + 1 and B earlier blocks,

- the query and its own block stand in slot min(B, k + 1), so no position beyond (k + 2) c is ever used;
- for ranking, the newest k blocks stand where they are relative to the query, all older ones in slot 0;
- the chosen blocks, oldest first, stand in slots 0 .. k - 1, one slot later if they are among the newest k.

With B <= k all blocks are read at their true positions: the grouped softmax of training.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rotate = Callable[[jax.Array, jax.Array], jax.Array]
"""Turns x (..., t, h, k) by positions (..., t)."""


def retrieve_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block: int,
    top: int,
    rotate: Rotate,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | None = None,
    query_chunk: int = 16,
) -> jax.Array:
    """Grouped softmax over the query's block and its `top` best earlier blocks.

    Args:
      q: (b, t, h, k) and k (b, s, g, k), both unrotated; v (b, s, g, v). h a multiple of g.
      top: blocks read beside the own one.
      query_positions, query_segments: (b, t); key_positions, key_segments: (b, s); as in landmark_attention.
      query_chunk: queries worked on at once (memory grows with it).

    Returns:
      (b, t, h, v) in q's dtype; zeros for padded queries.

    Raises:
      ValueError: top below 1.
    """
    if top < 1:
        raise ValueError(f"retrieve_blocks: top must be at least 1; got {top}")
    t = q.shape[1]
    q = jnp.where((query_segments != 0)[:, :, None, None], q, 0)
    k, v = (jnp.where((key_segments != 0)[:, :, None, None], x, 0) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = _Keys(k, v, key_positions, key_segments, block, rotate)

    def some(q: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        return _attend(q * jnp.asarray(scale, q.dtype), positions, segments, keys, top, rotate)

    if t <= query_chunk:
        return some(q, query_positions, query_segments)
    count = -(-t // query_chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * query_chunk - t)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, query_chunk, *x.shape[2:]), 1, 0)

    o = jax.lax.map(lambda part: some(*part), (split(q), split(query_positions), split(query_segments)))
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], count * query_chunk, *o.shape[3:])[:, :t]


class _Keys:
    """Keys, values and the complete blocks among them."""

    def __init__(self, k, v, positions, segments, block, rotate):
        self.k, self.v, self.positions, self.segments, self.block = k, v, positions, segments, block
        b, s, groups = k.shape[:3]
        c = block + 1
        n = max(1, s // c)
        closes = (positions % c == block) & (segments != 0)
        place = jnp.sort(jnp.where(closes, jnp.arange(s), s), axis=1)[:, :n]
        index = jnp.clip(place[:, :, None] - block + jnp.arange(c), 0, s - 1).reshape(b, n * c)

        def blocks(x):
            return jnp.take_along_axis(x, index[:, :, None, None], axis=1).reshape(b, n, c, groups, -1)

        inside = jnp.minimum(place, s - 1)
        self.block_k, self.block_v = blocks(k), blocks(v)
        self.exists = place < s
        self.number = jnp.take_along_axis(positions, inside, axis=1) // c
        self.segment = jnp.take_along_axis(segments, inside, axis=1)
        landmark = self.block_k[:, :, block]
        self.landmark_true = rotate(landmark, self.number * c + block)
        self.landmark_old = rotate(landmark, jnp.full_like(self.number, block))
        self.k_true = rotate(k, positions)


def _attend(q, positions, segments, keys, top, rotate):
    b, t, h, _ = q.shape
    groups = keys.k.shape[2]
    c = keys.block + 1
    wide = jnp.promote_types(q.dtype, jnp.float32)
    top = min(top, keys.exists.shape[1])

    def grouped(x):
        return x.reshape(b, t, groups, h // groups, x.shape[-1])

    earlier = positions // c
    stingy = positions - earlier * c + jnp.minimum(earlier, top + 1) * c
    q_true, q_stingy = grouped(rotate(q, positions)), grouped(rotate(q, stingy))

    # Rank.
    recent = earlier[:, :, None] - keys.number[:, None, :] <= top
    allowed = keys.exists[:, None, :] & (keys.number[:, None, :] < earlier[:, :, None])
    allowed &= (keys.segment[:, None, :] == segments[:, :, None]) & (segments != 0)[:, :, None]
    score_true = jnp.einsum("btgrk,bngk->btgrn", q_true, keys.landmark_true, preferred_element_type=wide)
    score_old = jnp.einsum("btgrk,bngk->btgrn", q_stingy, keys.landmark_old, preferred_element_type=wide)
    score = jnp.where(recent[:, :, None, None, :], score_true, score_old)
    score = jnp.where(allowed[:, :, None, None, :], score, -jnp.inf)
    best, chosen = jax.lax.top_k(jax.lax.stop_gradient(score), top)
    # Chronological order; those that are no block at all go last.
    n = keys.exists.shape[1]
    chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, n), axis=-1)
    valid = chosen < n
    chosen = jnp.minimum(chosen, n - 1)

    # Gather and place.
    rows = jnp.arange(b)[:, None, None, None, None]
    group = jnp.arange(groups)[None, None, :, None, None]
    picked_k = jnp.moveaxis(keys.block_k, 3, 2)[rows, chosen, group]  # (b, t, g, r, top, c, k)
    picked_v = jnp.moveaxis(keys.block_v, 3, 2)[rows, chosen, group]
    number = keys.number[rows, chosen]
    behind = earlier[:, :, None, None, None]
    shifted = jnp.arange(top) + (behind - number <= top)
    slot = jnp.where(behind > top, shifted, number)
    places = slot[..., None] * c + jnp.arange(c)
    picked_k = rotate(picked_k[..., None, :], places)[..., 0, :]
    scores = jnp.einsum("btgrk,btgrnck->btgrnc", q_stingy, picked_k, preferred_element_type=wide)
    inner = jax.nn.softmax(scores[..., : keys.block], axis=-1)
    gates = jnp.where(valid, scores[..., keys.block], -jnp.inf)

    # The own block: relative positions are true ones.
    i, j = positions[:, :, None], keys.positions[:, None, :]
    seen = (j <= i) & (i // c == j // c) & (j % c != keys.block)
    seen &= (segments[:, :, None] == keys.segments[:, None, :]) & (segments != 0)[:, :, None]
    own = jnp.einsum("btgrk,bsgk->btgrs", q_true, keys.k_true, preferred_element_type=wide)
    own = jnp.where(seen[:, :, None, None, :], own, -jnp.inf)

    high = jnp.maximum(jnp.max(gates, axis=-1), jnp.max(own, axis=-1))[..., None]
    high = jax.lax.stop_gradient(jnp.where(jnp.isfinite(high), high, 0))
    gates, own = jnp.exp(gates - high), jnp.exp(own - high)
    total = (jnp.sum(gates, axis=-1) + jnp.sum(own, axis=-1))[..., None]
    total = jnp.where(total > 0, total, 1)
    cross = (gates / total)[..., None] * inner
    o = jnp.einsum("btgrnc,btgrncv->btgrv", cross, picked_v[..., : keys.block, :], preferred_element_type=wide)
    o = o + jnp.einsum("btgrs,bsgv->btgrv", own / total, keys.v, preferred_element_type=wide)
    return o.reshape(b, t, h, -1).astype(q.dtype)
