"""The blocked form: keys of complete blocks gathered into (n, block + 1), one softmax inside each, one over what is left.

In one document from its start the gather is a reshape. Scores of a query with its own block are taken from neighbouring blocks only
(own and the one before in storage) when queries and keys are the same tokens; against a cache they are a masked product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def blocked(q, k, v, *, block, query_positions, key_positions, query_segments, key_segments, scale) -> jax.Array:
    """See the front door."""
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    c = block + 1
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if query_segments is not None:
        q = jnp.where((query_segments != 0)[:, :, None, None], q, 0)
        k, v = (jnp.where((key_segments != 0)[:, :, None, None], x, 0) for x in (k, v))
    q = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, groups, h // groups, dim)
    i = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)) if query_positions is None else query_positions
    n = s // c
    plain = key_positions is None and key_segments is None
    if plain:
        block_k, block_v = (x[:, : n * c].reshape(b, n, c, groups, x.shape[-1]) for x in (k, v))
        block_number = jnp.broadcast_to(jnp.arange(n), (b, n))
        allowed = block_number[:, None, :] < (i // c)[:, :, None]
    else:
        j = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s)) if key_positions is None else key_positions
        closes = j % c == block
        if key_segments is not None:
            closes &= key_segments != 0
        # Places of the landmarks, in order; s (out of range) where there are fewer than n.
        place = jnp.sort(jnp.where(closes, jnp.arange(s), s), axis=1)[:, :n]
        index = jnp.clip(place[:, :, None] - block + jnp.arange(c), 0, s - 1).reshape(b, n * c)
        block_k, block_v = (jnp.take_along_axis(x, index[:, :, None, None], axis=1).reshape(b, n, c, groups, x.shape[-1]) for x in (k, v))
        inside = jnp.minimum(place, s - 1)
        block_number = jnp.take_along_axis(j, inside, axis=1) // c
        allowed = (place < s)[:, None, :] & (block_number[:, None, :] < (i // c)[:, :, None])
        if key_segments is not None:
            allowed &= jnp.take_along_axis(key_segments, inside, axis=1)[:, None, :] == query_segments[:, :, None]
            allowed &= (query_segments != 0)[:, :, None]

    inner = jnp.einsum("btgrk,bncgk->btgrnc", q, block_k[:, :, :block], preferred_element_type=wide)
    inner = jax.nn.softmax(inner, axis=-1)  # every gathered block is whole, so no row is empty
    gates = jnp.einsum("btgrk,bngk->btgrn", q, block_k[:, :, block], preferred_element_type=wide)
    gates = jnp.where(allowed[:, :, None, None, :], gates, -jnp.inf)

    same = query_positions is key_positions and query_segments is key_segments and t == s
    own, own_v = (
        _own_banded(q, k, v, i, query_segments, c, wide)
        if same
        else _own_dense(q, k, v, i, key_positions, query_segments, key_segments, c, wide)
    )
    high = jnp.maximum(jnp.max(gates, axis=-1, initial=-jnp.inf), jnp.max(own, axis=-1))[..., None]
    high = jax.lax.stop_gradient(jnp.where(jnp.isfinite(high), high, 0))
    gates, own = jnp.exp(gates - high), jnp.exp(own - high)
    total = jnp.sum(gates, axis=-1) + jnp.sum(own, axis=-1)
    total = jnp.where(total > 0, total, 1)[..., None]
    cross = (gates / total)[..., None] * inner
    o = jnp.einsum("btgrnc,bncgv->btgrv", cross.astype(v.dtype), block_v[:, :, :block], preferred_element_type=wide)
    o = o + own_v(own / total)
    return o.reshape(b, t, h, v.shape[-1]).astype(q.dtype)


def _own_dense(q, k, v, i, key_positions, query_segments, key_segments, c, wide):
    """Scores (b, t, g, r, s) with ordinary keys of the query's own block, -inf elsewhere, and the product with values."""
    b, s = k.shape[:2]
    j = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s)) if key_positions is None else key_positions
    seen = _own_mask(i, j, query_segments, key_segments, c)
    scores = jnp.einsum("btgrk,bsgk->btgrs", q, k, preferred_element_type=wide)
    scores = jnp.where(seen[:, :, None, None, :], scores, -jnp.inf)
    return scores, lambda w: jnp.einsum("btgrs,bsgv->btgrv", w.astype(v.dtype), v, preferred_element_type=wide)


def _own_banded(q, k, v, i, segments, c, wide):
    """The same for self-attention, from a band: keys of a query's block lie less than c places before it."""
    b, t = q.shape[:2]
    n = -(-t // c)
    pad = n * c - t

    def chunk(x):
        return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(b, n, c, *x.shape[2:])

    def band(x):
        x = chunk(x)
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([before, x], axis=2)

    # Segment 0 marks what the band adds before the start and after the end.
    real = jnp.ones((b, t), jnp.int32) if segments is None else segments
    rows, columns = chunk(real).reshape(b * n, c), band(real).reshape(b * n, 2 * c)
    seen = _own_mask(chunk(i).reshape(b * n, c), band(i).reshape(b * n, 2 * c), rows, columns, c).reshape(b, n, c, 2 * c)
    scores = jnp.einsum("bnigrk,bnjgk->bnigrj", chunk(q), band(k), preferred_element_type=wide)
    scores = jnp.where(seen[:, :, :, None, None, :], scores, -jnp.inf)
    shape = q.shape[2:4]

    def values(w):
        w = chunk(w).astype(v.dtype)
        o = jnp.einsum("bnigrj,bnjgv->bnigrv", w, band(v), preferred_element_type=wide)
        return o.reshape(b, n * c, *shape, v.shape[-1])[:, :t]

    return scores.reshape(b, n * c, *shape, 2 * c)[:, :t], values


def _own_mask(i, j, query_segments, key_segments, c):
    i, j = i[:, :, None], j[:, None, :]
    seen = (j <= i) & (i // c == j // c) & (j % c != c - 1)
    if query_segments is not None:
        seen &= (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments != 0)[:, :, None]
    return seen
