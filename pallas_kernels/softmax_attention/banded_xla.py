"""Windowed self-attention for XLA: blocks of c >= window queries, each against the current and the previous block of
keys, so that the work grows with the window and not with the square of the length.

Padding inside a document would put keys of a window further away than the window in storage: rows are compacted first.
"""

from __future__ import annotations

import jax.numpy as jnp

from recollect.pallas_kernels.chunking import chunked, compaction, permuted, taken, unchunked, with_previous
from recollect.pallas_kernels.softmax_attention.xla import SMALLEST_BAND, attend, causal_pairs


def banded(q, k, v, window, positions, segments, sinks, scale):
    """Returns output and log-sum-exp."""
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
        allowed = causal_pairs(i, None, j, None, window) & (j >= 0)[..., None, :]
    else:
        i = jnp.broadcast_to(jnp.arange(t), (b, t)) if positions is None else positions
        i, segments = (chunked(x, c) for x in (i, jnp.ones((b, t), jnp.int32) if segments is None else segments))
        allowed = causal_pairs(i, segments, with_previous(i), with_previous(segments), window)
    out, lse = attend(q, with_previous(k), with_previous(v), allowed, scale, sinks)
    out, lse = (unchunked(x, t) for x in (out, lse))
    return (out, lse) if back is None else (permuted(out, back, order), permuted(lse, back, order))
