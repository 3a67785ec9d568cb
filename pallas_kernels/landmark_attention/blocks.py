"""Where landmark blocks lie among stored tokens. With c = block + 1, a token stands in block position // c of its
document, at position % c.

Keys of one document are stored in order and without gaps, so two landmarks are at least c tokens apart, and no c
consecutive tokens hold two: of each window of c stored tokens the landmark, if there is one, names at most one complete
block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LandmarkBlocks:
    """The complete landmark blocks of stored keys, one a window of c = block + 1 of them, in order of storage.

    Attributes:
      exists: (b, n) bool, whether a block closes in this window; if not, the others are of no meaning.
      start: (b, n) int32, where its first token is stored; its landmark is `block` further.
      number: (b, n) int32, its number within its document.
      segment: (b, n) int32, its document; 0 where it does not exist.
    """

    exists: jax.Array
    start: jax.Array
    number: jax.Array
    segment: jax.Array


jax.tree_util.register_dataclass(LandmarkBlocks, data_fields=["exists", "start", "number", "segment"], meta_fields=[])


def complete_blocks(positions: jax.Array, segments: jax.Array, block: int) -> LandmarkBlocks:
    """The blocks of keys with positions and segments (b, s) int; n is s / c, rounded up."""
    b, s = positions.shape
    c = block + 1
    n = -(-s // c)

    def windows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, n * c - s))).reshape(b, n, c).astype(jnp.int32)

    positions, segments = windows(positions), windows(segments)
    closes = (positions % c == block) & (segments != 0)
    landmark = closes * jnp.arange(1, c + 1, dtype=jnp.int32)
    start = jnp.arange(n, dtype=jnp.int32) * c + jnp.max(landmark, axis=2) - 1 - block
    number = jnp.max(jnp.where(closes, positions, 0), axis=2) // c
    # A document cut off in front (a cache that dropped its start) has no whole block there.
    exists = jnp.any(closes, axis=2) & (start >= 0)
    segment = jnp.max(jnp.where(closes, segments, 0), axis=2)
    return LandmarkBlocks(exists, jnp.where(exists, start, 0), number, jnp.where(exists, segment, 0))


def slices(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`size` consecutive rows from each start: x (b, s, ...) and start (b, ...) int to (b, ..., size, ...). Slices that
    would end behind the last row are moved forward to end there."""

    def row(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(x, first, size))(start)

    flat = jax.vmap(row)(x, start.reshape(start.shape[0], -1))
    return flat.reshape(*start.shape, size, *x.shape[2:])
