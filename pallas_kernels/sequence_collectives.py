"""Collectives over the parts of one sequence. Each function is called on every device of the mesh axis `sequence`,
inside of recollect.pallas_kernels.sharding.over_sequence, with the device's own consecutive part of the tokens, (b, t,
...).

Bytes that a device receives: `gathered` the whole sequence, `previous_tokens` what is asked for, the others a few
numbers per part. Gradients go the opposite way with as many bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import SEQUENCE


def parts() -> int:
    """Returns the number of parts of the sequence."""
    return jax.lax.axis_size(SEQUENCE)


def first_position(length: int) -> jax.Array:
    """Returns the place in the whole sequence, () int32, of the first of this part's `length` tokens."""
    return jax.lax.axis_index(SEQUENCE).astype(jnp.int32) * length


def global_positions(batch_size: int, length: int) -> jax.Array:
    """Returns the places in the whole sequence of this part's tokens, (batch_size, length) int32."""
    return jnp.broadcast_to(first_position(length) + jnp.arange(length, dtype=jnp.int32), (batch_size, length))


def gathered(x: jax.Array) -> jax.Array:
    """Returns the whole sequence (b, n t, ...) of parts (b, t, ...)."""
    return jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True)


def stacked(x: jax.Array) -> jax.Array:
    """Returns every part's x (b, ...), in order: (b, n, ...)."""
    return jax.lax.all_gather(x, SEQUENCE, axis=1)


def this_part(x: jax.Array) -> jax.Array:
    """Returns this part's (b, ...) of what `stacked` returned, (b, n, ...)."""
    return jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(SEQUENCE), axis=1, keepdims=False)


def previous_tokens(x: jax.Array, size: int) -> jax.Array:
    """Returns the `size` tokens just before this part's, (b, size, ...), from as many parts as hold them; zeros before
    the sequence."""
    t, n = x.shape[1], parts()
    received = []
    for hop in range(1, -(-size // t) + 1):
        local = x[:, t - min(t, size - (hop - 1) * t) :]
        # Parts that nobody sends to get zeros.
        received.append(jax.lax.ppermute(local, SEQUENCE, [(part, part + hop) for part in range(n - hop)]))
    return jnp.concatenate(received[::-1], axis=1) if received else x[:, :0]


def split_channels(x: jax.Array) -> jax.Array:
    """Returns all tokens with this part's channels, (b, n t, d / n), of this part's tokens with all, (b, t, d)."""
    return jax.lax.all_to_all(x, SEQUENCE, split_axis=2, concat_axis=1, tiled=True)


def split_tokens(x: jax.Array) -> jax.Array:
    """Returns this part's tokens with all channels: the inverse of `split_channels`."""
    return jax.lax.all_to_all(x, SEQUENCE, split_axis=1, concat_axis=2, tiled=True)


def previous_segment(segment_ids: jax.Array) -> jax.Array:
    """Returns the segment (b,) of the last token before this part that is no padding (segment 0); 0 if there is
    none."""
    last = last_where(segment_ids != 0, 1)
    local = jnp.where(last[:, 0] >= 0, jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)[:, 0], 0)
    return _last_of_previous_parts(stacked(local), 1)[0][:, 0]


def last_where(chosen: jax.Array, size: int) -> jax.Array:
    """Returns indices (b, size) of the last `size` true entries of (b, t), in order; -1, at the front, where there are
    fewer."""
    indices = jnp.where(chosen, jnp.arange(chosen.shape[1], dtype=jnp.int32), -1)
    short = max(0, size - chosen.shape[1])
    indices = jnp.pad(indices, ((0, 0), (short, 0)), constant_values=-1)
    return jax.lax.top_k(indices, size)[0][:, ::-1]


def last_inputs(x: jax.Array, segment_ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the last `size` tokens before this part that are no padding, wherever they stand.

    Args:
      x: (b, t, d), segment_ids: (b, t).

    Returns:
      (b, size, d), oldest first, zeros for tokens of other documents than the last one's; and that document's segment
      (b,), 0 if there is none.
    """
    index = last_where(segment_ids != 0, size)
    local = jnp.where((index >= 0)[..., None], jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1), 0)
    local_segments = jnp.where(index >= 0, jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1), 0)
    b, d = x.shape[0], x.shape[2]
    segments, index = _last_of_previous_parts(stacked(local_segments).reshape(b, -1), size)
    everything = stacked(local).reshape(b, -1, d)
    inputs = jnp.take_along_axis(everything, jnp.maximum(index, 0)[..., None], axis=1)
    last = segments[:, -1]
    return jnp.where(((segments == last[:, None]) & (segments != 0))[..., None], inputs, 0), last


def _last_of_previous_parts(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the last `size` segments that are not 0 of previous parts, (b, size), 0 where there are fewer, and their
    indices. segments: those of all parts, (b, n m), m per part."""
    count = segments.shape[1]
    is_previous = jnp.arange(count) < jax.lax.axis_index(SEQUENCE) * (count // parts())
    index = last_where((segments != 0) & is_previous, size)
    return jnp.where(index >= 0, jnp.take_along_axis(segments, jnp.maximum(index, 0), axis=1), 0), index
