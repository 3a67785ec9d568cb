"""Attention to the query's current landmark block: softmax over its ordinary tokens up to the query. Each function
returns fp32 (wider for fp64) outputs (b, t, g, r, v) and log-sum-exps (b, t, g, r), -inf where nothing is seen, for
queries (b, t, g, r, k), r query heads per key head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.chunking import chunked, in_parts, unchunked, with_previous
from recollect.pallas_kernels.key_schedule import slices
from recollect.pallas_kernels.softmax_attention.xla import attend

SMALLEST_BAND = 16
"""Queries per block of `banded`, at least: smaller landmark blocks make products too small to be fast."""

QUERIES = 32
"""Queries whose current blocks are gathered at once."""


def banded(q, k, v, positions, segments, *, block, scale) -> tuple[jax.Array, jax.Array]:
    """Self-attention: chunks of queries against the keys stored with them and, unless `positions` is None, one chunk
    before. None: one document from its start, whose blocks begin where chunks do."""
    t = q.shape[1]
    c = block + 1
    size = c * -(-SMALLEST_BAND // c)
    if positions is None:
        size = min(size, t)
        places = np.arange(size)
        seen = _seen(places, places, c)[None, None]
        out, lse = attend(chunked(q, size), chunked(k, size), chunked(v, size), seen, scale)
        return unchunked(out, t), unchunked(lse, t)
    segments = jnp.ones(positions.shape, jnp.int32) if segments is None else segments
    i, of_queries = chunked(positions, size), chunked(segments, size)
    j, of_keys = with_previous(i), with_previous(of_queries)
    seen = _seen(i, j, c) & (of_queries[..., :, None] == of_keys[..., None, :]) & (of_queries != 0)[..., :, None]
    k, v = (with_previous(chunked(x, size)) for x in (k, v))
    out, lse = attend(chunked(q, size), k, v, seen, scale)
    return unchunked(out, t), unchunked(lse, t)


def gathered(
    q, k, v, query_positions, query_segments, key_positions, key_segments, *, block, scale
) -> tuple[jax.Array, jax.Array]:
    """Queries against stored keys: each query's current block is found by its document and position, and read alone."""
    fields = (key_positions, key_segments)

    def some(part):
        q, positions, segments = part
        block_k, block_v, _, seen = gather_current_block(k, v, *fields, positions, segments, block=block)
        out, lse = attend(q[:, :, None], block_k, block_v, seen[:, :, None], scale)
        return out[:, :, 0], lse[:, :, 0]

    return in_parts(some, (q, query_positions, query_segments), QUERIES)


def gather_current_block(
    k, v, key_positions, key_segments, positions, segments, *, block
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns of each query, with positions and segments (b, t), its block's ordinary keys (b, t, m, g, k) and values,
    their positions (b, t, m) and whether it sees them (b, t, m); m is `block`, or s if there are fewer."""
    s, c = k.shape[1], block + 1
    size = min(block, s)
    first = (positions // c * c)[:, :, None]
    in_block = (key_segments[:, None, :] == segments[:, :, None]) & (key_positions[:, None, :] == first)
    start = jnp.min(jnp.where(in_block, jnp.arange(s, dtype=jnp.int32), s - size), axis=2)
    block_positions, block_segments, block_k, block_v = (
        slices(x, start, size) for x in (key_positions, key_segments, k, v)
    )
    seen = _seen(positions[..., None], block_positions, c)[:, :, 0]
    seen &= (block_segments == segments[:, :, None]) & (segments != 0)[:, :, None]
    return block_k, block_v, block_positions, seen


def _seen(i, j, c):
    """Ordinary keys at positions j (..., s) of the same block, up to the query at i (..., t)."""
    i, j = i[..., :, None], j[..., None, :]
    return (j <= i) & (i // c == j // c) & (j % c != c - 1)
