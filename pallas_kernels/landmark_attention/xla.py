"""Attends to the query's current block and to the previous ones separately, each over no more keys than it may see, and
merges them by their log-sum-exps; or, for a few queries against many keys, both at once without moving keys.

In one document from its start the blocks are a reshape of the keys; else they are gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.key_schedule import complete_blocks, slices
from recollect.pallas_kernels.landmark_attention import current_block
from recollect.pallas_kernels.landmark_attention.previous_blocks import previous_blocks
from recollect.pallas_kernels.landmark_attention.step import few_queries
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge
from recollect.pallas_kernels.segments import zero_padding


def landmark_attention(
    q, k, v, *, block, query_positions, key_positions, query_segments, key_segments, scale, self_attention
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp of the main group; arguments as those of the public function."""
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    c = block + 1
    q = zero_padding(q, query_segments)
    k, v = (zero_padding(x, key_segments) for x in (k, v))
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
        query_ids, key_ids = (
            jnp.ones(x.shape, jnp.int32) if y is None else y for x, y in ((i, query_segments), (j, key_segments))
        )
        if not self_attention and 2 * t * (h // groups) <= dim + v.shape[3]:
            o, lse = few_queries(q, k, v, i, query_ids, j, key_ids, block=block, scale=scale)
            return o.reshape(b, t, h, -1).astype(dtype), lse.reshape(b, t, h)
        if self_attention:
            parts = [current_block.banded(q, k, v, i, query_ids, block=block, scale=scale)]
        else:
            parts = [current_block.gathered(q, k, v, i, query_ids, j, key_ids, block=block, scale=scale)]
        if s >= c:
            landmark_blocks = complete_blocks(j, key_ids, c)
            blocks = (slices(x, landmark_blocks.start, c) for x in (k, v))
            parts.append(
                previous_blocks(
                    block,
                    scale,
                    0 if self_attention else None,
                    q,
                    *blocks,
                    i // c,
                    query_ids,
                    landmark_blocks.number,
                    landmark_blocks.segment,
                )
            )
    o, lse = merge(*((o.reshape(b, t, h, -1), lse.reshape(b, t, h)) for o, lse in parts))
    return o.astype(dtype), lse


def _positions(positions, b: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length)) if positions is None else positions
