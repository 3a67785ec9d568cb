"""Mask expressions for XLA: blocks of queries against the tiles of keys that the mask's schedule may have them visit,
where it is known at trace time that these are few; else all keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.chunking import chunked, unchunked
from recollect.pallas_kernels.scheduled_attention.block_schedule import (
    block_schedule,
    padded_fields,
    pairs_allowed,
    tile_allows,
)
from recollect.pallas_kernels.softmax_attention.scheduled import mask_and_fields
from recollect.pallas_kernels.softmax_attention.xla import attend

TILE = 64
"""Queries and keys per tile of a mask's schedule."""


def by_schedule(q, k, v, sinks, scale, **call):
    """Returns output and log-sum-exp; the tiles of keys that each tile of queries may visit are gathered, or all keys
    taken, where most would be. call: what `mask_and_fields` takes."""
    mask, query_fields, key_fields = mask_and_fields(q, k, **call)
    b, t = q.shape[:2]
    n, s = -(-t // TILE), -(-k.shape[1] // TILE) * TILE
    padded = padded_fields(query_fields, key_fields, (t, k.shape[1]), (n * TILE, s))
    schedule = block_schedule(mask, *padded, (n * TILE, s), (TILE, TILE))
    visits = schedule.visits()
    m = visits.index.shape[-1]
    if 2 * m * TILE > s:
        allowed = pairs_allowed(mask, query_fields, key_fields)
        return attend(q, k, v, jnp.broadcast_to(allowed, (b if query_fields else 1, t, k.shape[1])), scale, sinks)
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
