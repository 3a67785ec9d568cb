"""Retrieval of landmark blocks in plain JAX: gathers the scheduled blocks and the others of the query's window, and
attends to them and to the query's current block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import in_parts
from recollect.pallas_kernels.key_schedule import KeyBlocks, KeySchedule
from recollect.pallas_kernels.landmark_attention.current_block import gather_current_block
from recollect.pallas_kernels.landmark_attention.retrieval import stingy_positions


def landmark_retrieval(
    q, k, v, schedule: KeySchedule, queries, key_fields, *, window, rotate, scale, query_chunk
) -> jax.Array:
    """Returns the output; arguments as those of the public function, `queries` and `key_fields` each (positions,
    segments)."""
    short = max(0, schedule.size - k.shape[1])  # what is gathered is a block, which may be longer than all there is
    k, v, *key_fields = (jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) for x in (k, v, *key_fields))
    q = jnp.where((queries[1] != 0)[:, :, None, None], q, 0) * jnp.asarray(scale, q.dtype)

    def some(part: Any) -> jax.Array:
        q, positions, segments, *picked = part
        stored = (k, v, key_fields, schedule.blocks, schedule.size)
        return _attend(q, positions, segments, picked, *stored, window, rotate)

    return in_parts(some, (q, *queries, schedule.index, schedule.valid), query_chunk)


def _attend(q, positions, segments, picked, k, v, key_fields, blocks: KeyBlocks, c, window, rotate):
    b, t, h, _ = q.shape
    groups, block, top = k.shape[2], c - 1, picked[0].shape[-1]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def grouped(x):
        return x.reshape(b, t, groups, h // groups, x.shape[-1])

    chosen, valid = map(grouped, picked)
    before = positions // c // window * window  # blocks before the window
    stingy = stingy_positions(positions, c, top, window)
    q_true, q_stingy = grouped(rotate(q, positions)), grouped(rotate(q, stingy))

    rows = jnp.arange(b)[:, None, None, None, None]
    number, behind = blocks.number[rows, chosen], before[:, :, None, None, None]
    shifted = jnp.arange(top) + (behind - number <= top)
    slot = jnp.where(behind > top, shifted, number)
    if window > 1:  # and the window's blocks before the query's, where they are relative to it
        there, those = _blocks_of_window(positions, segments, blocks, c, window)
        one = (*chosen.shape[:4], window - 1)
        chosen = jnp.concatenate([chosen, jnp.broadcast_to(those[:, :, None, None], one)], axis=-1)
        valid = jnp.concatenate([valid, jnp.broadcast_to(there[:, :, None, None], one)], axis=-1)
        beside = jnp.minimum(behind, top + 1) + jnp.arange(window - 1)
        slot = jnp.concatenate([slot, jnp.broadcast_to(beside, one)], axis=-1)

    # Gather and place.
    group = jnp.broadcast_to(jnp.arange(groups)[:, None, None], chosen.shape)
    start = blocks.start[rows, chosen]
    # What is gathered in place of what does not exist may be padding, and a weight of 0 times NaN would be NaN.
    picked_k, picked_v = (jnp.where(valid[..., None, None], _slices_of_heads(x, start, group, c), 0) for x in (k, v))
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


def _blocks_of_window(positions, segments, blocks: KeyBlocks, c, window) -> tuple[jax.Array, jax.Array]:
    """Returns for each query whether each of the window's first blocks is before its own, and where it is, both (b, t,
    window - 1)."""
    own = (positions // c)[:, :, None]
    numbers = own // window * window + jnp.arange(window - 1)
    fits = (blocks.number[:, None, None] == numbers[..., None]) & blocks.exists[:, None, None]
    fits &= blocks.segment[:, None, None] == segments[:, :, None, None]
    there = jnp.any(fits, axis=-1) & (numbers < own) & (segments != 0)[:, :, None]
    return there, jnp.argmax(fits, axis=-1)


def _slices_of_heads(x: jax.Array, start: jax.Array, head: jax.Array, size: int) -> jax.Array:
    """Returns `size` consecutive tokens of one head for each start and head (b, ...): x (b, s, g, d) to (b, ..., size,
    d)."""

    def row(x: jax.Array, start: jax.Array, head: jax.Array) -> jax.Array:
        zero = jnp.zeros((), start.dtype)
        return jax.vmap(lambda i, j: jax.lax.dynamic_slice(x, (i, j, zero), (size, 1, x.shape[2]))[:, 0])(start, head)

    flat = (y.astype(jnp.int32).reshape(y.shape[0], -1) for y in (start, head))
    return jax.vmap(row)(x, *flat).reshape(*start.shape, size, x.shape[3])
