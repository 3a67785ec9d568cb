"""A query's own landmark block: softmax over its ordinary tokens up to the query. Each form returns fp32 (wider for fp64) outputs
(b, t, g, r, v) and log-sum-exps (b, t, g, r), -inf where nothing is seen, for queries (b, t, g, r, k), r query heads a key head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.landmark_attention.blocks import slices

SMALLEST_BAND = 16
"""Queries a block of the banded form, at least: smaller landmark blocks make products too small to be fast."""

QUERIES = 32
"""Queries whose own blocks are gathered at once."""


def banded(q, k, v, positions, segments, *, block, scale) -> tuple[jax.Array, jax.Array]:
    """Self-attention: chunks of queries against the keys stored with them and, unless `positions` is None, one chunk before. None: one document
    from its start, whose blocks begin where chunks do."""
    t = q.shape[1]
    c = block + 1
    size = c * -(-SMALLEST_BAND // c)
    if positions is None:
        size = min(size, t)
        places = np.arange(size)
        seen = _seen(places, places, c)[None, None]
        return _joined(*attend(_chunks(q, size), _chunks(k, size), _chunks(v, size), seen, scale), t)
    segments = jnp.ones(positions.shape, jnp.int32) if segments is None else segments
    i, own = _chunks(positions, size), _chunks(segments, size)
    j, others = _with_previous(i), _with_previous(own)
    seen = _seen(i, j, c) & (own[..., :, None] == others[..., None, :]) & (own != 0)[..., :, None]
    k, v = (_with_previous(_chunks(x, size)) for x in (k, v))
    return _joined(*attend(_chunks(q, size), k, v, seen, scale), t)


def gathered(q, k, v, query_positions, query_segments, key_positions, key_segments, *, block, scale) -> tuple[jax.Array, jax.Array]:
    """Queries against stored keys: each query's own block is found by its document and position, and read alone."""
    fields = (key_positions, key_segments)

    def some(part):
        q, positions, segments = part
        own_k, own_v, _, seen = own_block(k, v, *fields, positions, segments, block=block)
        out, lse = attend(q[:, :, None], own_k, own_v, seen[:, :, None], scale)
        return out[:, :, 0], lse[:, :, 0]

    return in_parts(some, (q, query_positions, query_segments), QUERIES)


def own_block(k, v, key_positions, key_segments, positions, segments, *, block) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each query, with positions and segments (b, t), its block's ordinary keys (b, t, m, g, k) and values, their positions (b, t, m) and
    whether it sees them (b, t, m); m is `block`, or s if there are fewer."""
    s, c = k.shape[1], block + 1
    size = min(block, s)
    first = (positions // c * c)[:, :, None]
    here = (key_segments[:, None, :] == segments[:, :, None]) & (key_positions[:, None, :] == first)
    start = jnp.min(jnp.where(here, jnp.arange(s, dtype=jnp.int32), s - size), axis=2)
    own_positions, own_segments, own_k, own_v = (slices(x, start, size) for x in (key_positions, key_segments, k, v))
    seen = _seen(positions[..., None], own_positions, c)[:, :, 0]
    seen &= (own_segments == segments[:, :, None]) & (segments != 0)[:, :, None]
    return own_k, own_v, own_positions, seen


def attend(q, k, v, seen, scale) -> tuple[jax.Array, jax.Array]:
    """Softmax attention for q (..., t, g, r, k), k (..., s, g, k), v (..., s, g, v), seen broadcasting to (..., t, s)."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...tgrk,...sgk->...gtrs", q, k, preferred_element_type=wide) * scale
    scores = jnp.where(seen[..., None, :, None, :], scores, -jnp.inf)
    high = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(wide).min))
    weights = jnp.exp(scores - high[..., None])
    total = jnp.sum(weights, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum("...gtrs,...sgv->...gtrv", weights.astype(v.dtype), v, preferred_element_type=wide) / total[..., None]
    return jnp.swapaxes(out, -4, -3), jnp.swapaxes(jnp.where(some, high + jnp.log(total), -jnp.inf), -3, -2)


def in_parts(function, arrays, size):
    """function of a tuple of (b, t, ...) arrays, `size` of t at a time; for results (b, t, ...), each independent of the others."""
    t = arrays[0].shape[1]
    if t <= size:
        return function(arrays)
    parts = tuple(jnp.moveaxis(_chunks(x, size), 1, 0) for x in arrays)
    return jax.tree.map(lambda x: _joined_one(jnp.moveaxis(x, 0, 1), t), jax.lax.map(function, parts))


def _seen(i, j, c):
    """Ordinary keys at positions j (..., s) of the same block, up to the query at i (..., t)."""
    i, j = i[..., :, None], j[..., None, :]
    return (j <= i) & (i // c == j // c) & (j % c != c - 1)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """(b, t, ...) to (b, n, size, ...), zeros at the end."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], n, size, *x.shape[2:])


def _with_previous(x: jax.Array) -> jax.Array:
    """Chunks (b, n, size, ...) to (b, n, 2 size, ...): the chunk before (zeros before the first), then the chunk."""
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
    return jnp.concatenate([before, x], axis=2)


def _joined(out: jax.Array, lse: jax.Array, t: int) -> tuple[jax.Array, jax.Array]:
    return _joined_one(out, t), _joined_one(lse, t)


def _joined_one(x: jax.Array, t: int) -> jax.Array:
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]
