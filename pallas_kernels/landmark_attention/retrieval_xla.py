"""Retrieval of landmark blocks in plain JAX: ranks blocks by their landmarks, gathers the chosen ones, and attends to
them and to the query's current block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import in_parts
from recollect.pallas_kernels.landmark_attention.blocks import LandmarkBlocks, complete_blocks
from recollect.pallas_kernels.landmark_attention.current_block import gather_current_block


def landmark_retrieval(q, k, v, queries, key_fields, *, block, top, rotate, scale, query_chunk) -> jax.Array:
    """Returns the output; arguments as those of the public function, `queries` and `key_fields` each (positions,
    segments)."""
    short = max(0, block + 1 - k.shape[1])  # what is gathered is a block, which may be longer than all there is
    k, v, *key_fields = (jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) for x in (k, v, *key_fields))
    q = jnp.where((queries[1] != 0)[:, :, None, None], q, 0) * jnp.asarray(scale, q.dtype)
    blocks = complete_blocks(key_fields[0], key_fields[1], block)
    landmarks = jnp.take_along_axis(k, jnp.minimum(blocks.start + block, k.shape[1] - 1)[:, :, None, None], axis=1)
    landmarks = jnp.where(blocks.exists[:, :, None, None], landmarks, 0)
    rotated = (
        rotate(landmarks, blocks.number * (block + 1) + block),
        rotate(landmarks, jnp.full_like(blocks.number, block)),
    )

    def some(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _attend(*part, k, v, key_fields, blocks, rotated, block, top, rotate)

    return in_parts(some, (q, *queries), query_chunk)


def _attend(q, positions, segments, k, v, key_fields, blocks: LandmarkBlocks, landmarks, block, top, rotate):
    b, t, h, _ = q.shape
    groups = k.shape[2]
    c = block + 1
    wide = jnp.promote_types(q.dtype, jnp.float32)
    n = blocks.start.shape[1]
    top = min(top, n)

    def grouped(x):
        return x.reshape(b, t, groups, h // groups, x.shape[-1])

    blocks_before = positions // c
    stingy = positions - blocks_before * c + jnp.minimum(blocks_before, top + 1) * c
    q_true, q_stingy = grouped(rotate(q, positions)), grouped(rotate(q, stingy))

    # Rank.
    recent = blocks_before[:, :, None] - blocks.number[:, None, :] <= top
    allowed = blocks.exists[:, None, :] & (blocks.number[:, None, :] < blocks_before[:, :, None])
    allowed &= (blocks.segment[:, None, :] == segments[:, :, None]) & (segments != 0)[:, :, None]
    score_true, score_old = (
        jnp.einsum("btgrk,bngk->btgrn", x, y, preferred_element_type=wide)
        for x, y in zip((q_true, q_stingy), landmarks, strict=True)
    )
    score = jnp.where(recent[:, :, None, None, :], score_true, score_old)
    score = jnp.where(allowed[:, :, None, None, :], score, -jnp.inf)
    best, chosen = jax.lax.top_k(jax.lax.stop_gradient(score), top)
    # Chronological order; those that are no block at all go last.
    chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, n), axis=-1)
    valid = chosen < n
    chosen = jnp.minimum(chosen, n - 1)

    # Gather and place.
    rows = jnp.arange(b)[:, None, None, None, None]
    group = jnp.broadcast_to(jnp.arange(groups)[:, None, None], chosen.shape)
    start, number = blocks.start[rows, chosen], blocks.number[rows, chosen]
    # What is gathered in place of what does not exist may be padding, and a weight of 0 times NaN would be NaN.
    picked_k, picked_v = (jnp.where(valid[..., None, None], _slices_of_heads(x, start, group, c), 0) for x in (k, v))
    behind = blocks_before[:, :, None, None, None]
    shifted = jnp.arange(top) + (behind - number <= top)
    slot = jnp.where(behind > top, shifted, number)
    places = slot[..., None] * c + jnp.arange(c)
    picked_k = rotate(picked_k[..., None, :], places)[..., 0, :]
    scores = jnp.einsum("btgrk,btgrnck->btgrnc", q_stingy, picked_k, preferred_element_type=wide)
    inner = jax.nn.softmax(scores[..., :block], axis=-1)
    gates = jnp.where(valid, scores[..., block], -jnp.inf)

    # The current block: relative positions are true ones.
    block_k, block_v, block_positions, seen = gather_current_block(
        k, v, key_fields[0], key_fields[1], positions, segments, block=block
    )
    block_k, block_v = (jnp.where(seen[..., None, None], x, 0) for x in (block_k, block_v))
    current = jnp.einsum("btgrk,btmgk->btgrm", q_true, rotate(block_k, block_positions), preferred_element_type=wide)
    current = jnp.where(seen[:, :, None, None, :], current, -jnp.inf)

    high = jnp.maximum(jnp.max(gates, axis=-1), jnp.max(current, axis=-1))[..., None]
    high = jax.lax.stop_gradient(jnp.where(jnp.isfinite(high), high, 0))
    gates, current = jnp.exp(gates - high), jnp.exp(current - high)
    total = (jnp.sum(gates, axis=-1) + jnp.sum(current, axis=-1))[..., None]
    total = jnp.where(total > 0, total, 1)
    cross = (gates / total)[..., None] * inner
    o = jnp.einsum("btgrnc,btgrncv->btgrv", cross, picked_v[..., :block, :], preferred_element_type=wide)
    o = o + jnp.einsum("btgrm,btmgv->btgrv", current / total, block_v, preferred_element_type=wide)
    return o.reshape(b, t, h, -1).astype(q.dtype)


def _slices_of_heads(x: jax.Array, start: jax.Array, head: jax.Array, size: int) -> jax.Array:
    """Returns `size` consecutive tokens of one head for each start and head (b, ...): x (b, s, g, d) to (b, ..., size,
    d)."""

    def row(x: jax.Array, start: jax.Array, head: jax.Array) -> jax.Array:
        zero = jnp.zeros((), start.dtype)
        return jax.vmap(lambda i, j: jax.lax.dynamic_slice(x, (i, j, zero), (size, 1, x.shape[2]))[:, 0])(start, head)

    flat = (y.astype(jnp.int32).reshape(y.shape[0], -1) for y in (start, head))
    return jax.vmap(row)(x, *flat).reshape(*start.shape, size, x.shape[3])
