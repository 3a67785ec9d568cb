"""Dense products over what can be seen, in four forms: all keys; for self-attention blocks of queries against the keys
stored up to their end; for windowed self-attention blocks of queries against their own and the previous block of keys,
so that the work grows with the window and not with the square of the length; for mask expressions blocks of queries
against the tiles of keys that the mask's schedule may have them visit, where it is known at trace time that these are
few.

Padding inside a document would put keys of a window further away than the window in storage: rows are compacted first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.chunking import chunked, compaction, permuted, taken, unchunked, with_previous
from recollect.pallas_kernels.dense_softmax import attend
from recollect.pallas_kernels.masks import is_expression
from recollect.pallas_kernels.scheduled_attention.block_schedule import block_schedule, padded_fields, tile_allows
from recollect.pallas_kernels.softmax_attention.scheduled import mask_and_fields

QUERY_BLOCK = 128
"""Queries a block of the causal form, at least; two CPU cores at (8, 512, 4, 32) take 42 ms for value and gradient
against 63 in one block."""

MOST_BLOCKS = 16
"""Blocks are unrolled in the program: longer sequences get longer blocks."""

SMALLEST_BAND = 32
"""Queries a block of the banded form, at least: smaller windows make products too small to be fast."""

TILE = 64
"""Queries and keys a tile of a mask's schedule."""


def softmax_attention(
    q,
    k,
    v,
    *,
    window,
    mask,
    sinks,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    query_fields,
    key_fields,
    scale,
    **rest,
) -> tuple[jax.Array, jax.Array]:
    """See the front door for the arguments; returns the output and the log-sum-exp."""
    b, t, h, _ = q.shape
    groups = k.shape[2]
    self_attention = k.shape[1] == t and query_positions is key_positions and query_segments is key_segments
    if query_segments is not None:
        q = jnp.where((query_segments != 0)[:, :, None, None], q, 0)
        k, v = (jnp.where((key_segments != 0)[:, :, None, None], x, 0) for x in (k, v))
    dtype = q.dtype
    q = q.reshape(b, t, groups, h // groups, -1)
    if sinks is not None:
        sinks = sinks.reshape(groups, 1, h // groups)
    if is_expression(mask):
        fields = mask_and_fields(
            q,
            k,
            window=window,
            mask=mask,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=query_segments,
            key_segments=key_segments,
            query_fields=query_fields,
            key_fields=key_fields,
        )
        out, lse = _by_schedule(q, k, v, *fields, sinks, scale)
    elif mask is not None:
        if query_segments is not None:
            mask = mask & (query_segments != 0)[:, :, None]
        out, lse = attend(q, k, v, mask, scale, sinks)
    elif not self_attention:
        allowed = _allowed(
            _positions(q, query_positions), query_segments, _positions(k, key_positions), key_segments, window
        )
        out, lse = attend(q, k, v, allowed, scale, sinks)
    elif window is not None and t > 2 * max(window, SMALLEST_BAND):
        out, lse = _banded(q, k, v, window, query_positions, query_segments, sinks, scale)
    else:
        out, lse = _triangular(q, k, v, window, query_positions, query_segments, sinks, scale)
    if sinks is not None and query_segments is not None:
        lse = jnp.where((query_segments != 0)[:, :, None, None], lse, -jnp.inf)
    return out.astype(dtype).reshape(b, t, h, -1), lse.reshape(b, t, h)


def _positions(x, positions) -> jax.Array:
    return jnp.arange(x.shape[1])[None] if positions is None else positions


def _allowed(i, query_segments, j, key_segments, window) -> jax.Array:
    """Returns the causal mask of positions i (..., t) and j (..., s): (..., t, s) bool."""
    distance = i[..., :, None] - j[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if query_segments is not None:
        allowed &= (query_segments[..., :, None] == key_segments[..., None, :]) & (query_segments != 0)[..., :, None]
    return allowed


def _triangular(q, k, v, window, positions, segments, sinks, scale):
    """Blocks of queries, each against the keys stored up to its end."""
    t = q.shape[1]
    i = _positions(q, positions)
    size = max(QUERY_BLOCK, -(-t // MOST_BLOCKS))
    parts = []
    for start in range(0, t, size):
        end = min(start + size, t)
        own, others = (None, None) if segments is None else (segments[:, start:end], segments[:, :end])
        allowed = _allowed(i[:, start:end], own, i[:, :end], others, window)
        parts.append(attend(q[:, start:end], k[:, :end], v[:, :end], allowed, scale, sinks))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _banded(q, k, v, window, positions, segments, sinks, scale):
    """Blocks of c >= window queries, each against its own and the previous block of keys."""
    b, t = q.shape[:2]
    back = None
    if segments is not None:
        order, back = compaction(segments)
        q, k, v = (permuted(x, order, back) for x in (q, k, v))
        segments, positions = taken(segments, order), order if positions is None else taken(positions, order)
    n = -(-t // max(window, SMALLEST_BAND))
    c = max(window, -(-t // n))
    n = -(-t // c)
    # Padding at the end needs no mask of its own in one document: it lies after every query that is kept.
    q, k, v = (chunked(x, c) for x in (q, k, v))
    if positions is None and segments is None:
        i = jnp.arange(n * c).reshape(1, n, c)
        j = i[..., :1] - c + jnp.arange(2 * c)
        allowed = _allowed(i, None, j, None, window) & (j >= 0)[..., None, :]
    else:
        i = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions
        i, segments = (chunked(x, c) for x in (i, jnp.ones((b, t), jnp.int32) if segments is None else segments))
        allowed = _allowed(i, segments, with_previous(i), with_previous(segments), window)
    out, lse = attend(q, with_previous(k), with_previous(v), allowed, scale, sinks)
    out, lse = (unchunked(x, t) for x in (out, lse))
    return (out, lse) if back is None else (permuted(out, back, order), permuted(lse, back, order))


def _by_schedule(q, k, v, mask, query_fields, key_fields, sinks, scale):
    """The tiles of keys that each tile of queries may visit, gathered; or all keys, where most would be."""
    b, t = q.shape[:2]
    n, s = -(-t // TILE), -(-k.shape[1] // TILE) * TILE
    padded = padded_fields(query_fields, key_fields, (t, k.shape[1]), (n * TILE, s))
    schedule = block_schedule(mask, *padded, (n * TILE, s), (TILE, TILE))
    visits = schedule.visits()
    m = visits.index.shape[-1]
    if 2 * m * TILE > s:
        query, key = ({name: jnp.asarray(x) for name, x in fields.items()} for fields in (query_fields, key_fields))
        query, key = (
            {name: x[:, :, None] for name, x in query.items()},
            {name: x[:, None, :] for name, x in key.items()},
        )
        return attend(
            q,
            k,
            v,
            jnp.broadcast_to(tile_allows(mask, query, key), (1 if not query else b, t, k.shape[1])),
            scale,
            sinks,
        )
    index = jnp.asarray(visits.index)[:, 0]  # (b or 1, n, m)
    within = jnp.arange(m) < jnp.asarray(visits.count)[:, 0, :, None]

    def visited(x):
        """(b or 1, s, ...) to (b or 1, n, m TILE, ...)."""
        x = jnp.pad(x, ((0, 0), (0, s - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], s // TILE, TILE, *x.shape[2:])
        rows = np.arange(x.shape[0])[:, None, None] if index.shape[0] > 1 else slice(None)
        x = x[rows, index] if index.shape[0] > 1 else x[:, index[0]]
        return x.reshape(x.shape[0], n, m * TILE, *x.shape[4:])

    query, key = ({name: jnp.asarray(x) for name, x in fields.items()} for fields in padded)
    query = {name: x.reshape(-1, n, TILE, 1) for name, x in query.items()}
    key = {name: visited(x)[:, :, None, :] for name, x in key.items()}
    allowed = tile_allows(mask, query, key) & jnp.repeat(within, TILE, axis=-1)[:, :, None, :]
    out, lse = attend(chunked(q, TILE), visited(k), visited(v), allowed, scale, sinks)
    return tuple(unchunked(x, t) for x in (out, lse))
