"""The query's own block and the earlier ones apart, each over no more keys than it may see, merged by their
log-sum-exps; or, for a few queries against many keys, both at once without moving keys.

In one document from its start the blocks are a reshape of the keys; else they are gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.landmark_attention import current_block
from recollect.pallas_kernels.landmark_attention.blocks import complete_blocks, slices
from recollect.pallas_kernels.landmark_attention.previous_blocks import previous_blocks
from recollect.pallas_kernels.landmark_attention.step import few_queries
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge


def landmark_attention(
    q, k, v, *, block, query_positions, key_positions, query_segments, key_segments, scale, self_attention
) -> tuple[jax.Array, jax.Array]:
    """See the front door for the arguments; returns the output and the log-sum-exp of the main group."""
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    c = block + 1
    if query_segments is not None:
        q = jnp.where((query_segments != 0)[:, :, None, None], q, 0)
        k, v = (jnp.where((key_segments != 0)[:, :, None, None], x, 0) for x in (k, v))
    dtype, scale = q.dtype, float(scale)
    q = q.reshape(b, t, groups, h // groups, dim)
    if self_attention and query_positions is None and query_segments is None:
        parts = [current_block.banded(q, k, v, None, None, block=block, scale=scale)]
        n = (t - 1) // c  # of a block that ends with the last token no query is left
        if n:
            blocks = (x[:, : n * c].reshape(b, n, c, *x.shape[2:]) for x in (k, v))
            numbers = jnp.arange(n, dtype=jnp.int32)[None]
            parts.append(
                previous_blocks(
                    block, scale, block, q, *blocks, jnp.arange(t, dtype=jnp.int32)[None] // c, None, numbers, None
                )
            )
    else:
        i, j = (_positions(x, b, length) for x, length in ((query_positions, t), (key_positions, s)))
        mine, theirs = (
            jnp.ones(x.shape, jnp.int32) if y is None else y for x, y in ((i, query_segments), (j, key_segments))
        )
        if not self_attention and 2 * t * (h // groups) <= dim + v.shape[3]:
            o, lse = few_queries(q, k, v, i, mine, j, theirs, block=block, scale=scale)
            return o.reshape(b, t, h, -1).astype(dtype), lse.reshape(b, t, h)
        if self_attention:
            parts = [current_block.banded(q, k, v, i, mine, block=block, scale=scale)]
        else:
            parts = [current_block.gathered(q, k, v, i, mine, j, theirs, block=block, scale=scale)]
        if s >= c:
            found = complete_blocks(j, theirs, block)
            blocks = (slices(x, found.start, c) for x in (k, v))
            parts.append(
                previous_blocks(
                    block, scale, 0 if self_attention else None, q, *blocks, i // c, mine, found.number, found.segment
                )
            )
    o, lse = merge(*((o.reshape(b, t, h, -1), lse.reshape(b, t, h)) for o, lse in parts))
    return o.astype(dtype), lse


def _positions(positions, b: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length)) if positions is None else positions
