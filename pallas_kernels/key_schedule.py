"""Which blocks of stored keys each query reads, where that follows from what keys hold: what selectors yield, and
landmark attention retrieves by.

A block is `size` tokens of a document, which begin at multiples of `stride` (of `size`, if nothing else is said). Keys
of one document are stored in order and without gaps, so no `stride` consecutive tokens hold the ends of two blocks: of
each window of that many stored tokens at most one complete block ends there.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """The complete blocks of stored keys, one per window of `stride` of them, in order of storage.

    Attributes:
      exists: whether a block ends in this window; if not, the others are of no meaning.
      start: where its first token is stored.
      number: its number within its document.
      segment: its document; 0 where it does not exist.
    """

    exists: Bool[Array, "b n"]
    start: Int[Array, "b n"]
    number: Int[Array, "b n"]
    segment: Int[Array, "b n"]


def complete_blocks(
    positions: Int[Array, "b s"], segments: Int[Array, "b s"], size: int, stride: int | None = None
) -> KeyBlocks:
    """Returns the blocks of keys with these positions and segments; n is s / stride, rounded up."""
    b, s = positions.shape
    stride = size if stride is None else stride
    n = -(-s // stride)

    def windows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, n * stride - s))).reshape(b, n, stride).astype(jnp.int32)

    positions, segments = windows(positions), windows(segments)
    first = positions - (size - 1)
    ends = (first >= 0) & (first % stride == 0) & (segments != 0)
    place = ends * jnp.arange(1, stride + 1, dtype=jnp.int32)
    start = jnp.arange(n, dtype=jnp.int32) * stride + jnp.max(place, axis=2) - size
    number = jnp.max(jnp.where(ends, first, 0), axis=2) // stride
    # A document cut off in front (a cache that dropped its start) has no whole block there.
    exists = jnp.any(ends, axis=2) & (start >= 0)
    segment = jnp.max(jnp.where(ends, segments, 0), axis=2)
    return KeyBlocks(exists, jnp.where(exists, start, 0), number, jnp.where(exists, segment, 0))


def slices(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `size` consecutive rows from each start: x (b, s, ...) and start (b, ...) int to (b, ..., size, ...).
    Slices that would end behind the last row are moved forward to end there."""

    def row(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(x, first, size))(start)

    flat = jax.vmap(row)(x, start.reshape(start.shape[0], -1))
    return flat.reshape(*start.shape, size, *x.shape[2:])


def block_of(positions: Int[Array, "b s"], blocks: KeyBlocks, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns for each key the window in which its block ends, and whether that block is complete, (b, s) both."""
    place = jnp.arange(positions.shape[1], dtype=jnp.int32)
    window = jnp.minimum((place + size - 1 - positions % size) // size, blocks.start.shape[1] - 1)
    start, exists = (jnp.take_along_axis(x, window, axis=1) for x in (blocks.start, blocks.exists))
    return window, exists & (place >= start) & (place < start + size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeySchedule:
    """The blocks that each query reads, for each of r groups of heads (1, key heads or heads).

    Attributes:
      index: the blocks, oldest first; valid: where one was picked.
      size: tokens of a block.
      own: whether a query reads the block that it stands in, too.
    """

    blocks: KeyBlocks
    index: Int[Array, "b t r m"]
    valid: Bool[Array, "b t r m"]
    size: int = dataclasses.field(metadata={"static": True})
    own: bool = dataclasses.field(default=True, metadata={"static": True})

    def mask(
        self,
        query_positions: Int[Array, "b t"],
        query_segments: Int[Array, "b t"],
        key_positions: Int[Array, "b s"],
        key_segments: Int[Array, "b s"],
    ) -> Bool[Array, "b r t s"]:
        """Returns which keys a query reads; causality inside of a block is the caller's."""
        n = self.blocks.start.shape[1]
        picked = jnp.zeros((*self.index.shape[:3], n + 1), bool)
        picked = jnp.put_along_axis(picked, jnp.where(self.valid, self.index, n), True, axis=-1, inplace=False)
        window, inside = block_of(key_positions, self.blocks, self.size)
        read = jnp.take_along_axis(picked, window[:, None, None], axis=-1) & inside[:, None, None]
        if self.own:
            i, j = query_positions[:, :, None] // self.size, key_positions[:, None] // self.size
            read |= ((i == j) & (query_segments[:, :, None] == key_segments[:, None]))[:, :, None]
        return jnp.swapaxes(read, 1, 2)


def earlier_blocks(
    blocks: KeyBlocks, query_numbers: Int[Array, "b t"], query_segments: Int[Array, "b t"]
) -> Bool[Array, "b t n"]:
    """Returns which blocks are of the query's document and before the one of its number."""
    before = blocks.exists[:, None] & (blocks.number[:, None] < query_numbers[:, :, None])
    return before & (blocks.segment[:, None] == query_segments[:, :, None]) & (query_segments != 0)[:, :, None]


def best_blocks(
    scores: Float[Array, "b t r n"], allowed: Bool[Array, "b t #r n"], top: int
) -> tuple[Int[Array, "b t r m"], Bool[Array, "b t r m"]]:
    """Returns the `top` allowed blocks of the largest scores, oldest first, and where there is one; among equal scores
    the older block is taken. No gradient passes."""
    n = scores.shape[-1]
    best, index = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(allowed, scores, -jnp.inf)), min(top, n))
    index = jnp.sort(jnp.where(best > -jnp.inf, index, n), axis=-1)
    return jnp.minimum(index, n - 1), index < n
