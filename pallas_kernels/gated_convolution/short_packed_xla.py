"""The short convolution for XLA in rows of several documents: valid tokens are moved to the front of their row and put
back at the end, so that padding in the middle of a document leaves no holes in the count of lags."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import compaction, permuted, taken
from recollect.pallas_kernels.gated_convolution.short_blocks_xla import documents_by_blocks
from recollect.pallas_kernels.gated_convolution.short_xla import UNROLLED, activated, shifted
from recollect.pallas_kernels.segments import zero_padding


def packed(
    x, taps, bias, segment_ids, initial_segment, *, in_gate, out_gate, activation, initial_state, return_state
) -> tuple[jax.Array, jax.Array | None]:
    """See recollect.pallas_kernels.gated_convolution."""
    b, t, d = x.shape
    past = taps.shape[0] - 1
    old = jnp.zeros((b, past, d), x.dtype) if initial_state is None else initial_state
    order, place = compaction(segment_ids)
    in_front = taken(segment_ids, order)
    gated = zero_padding(x, segment_ids)
    if in_gate is not None:
        gated = gated.astype(jnp.float32) * zero_padding(in_gate, segment_ids).astype(jnp.float32)
    moved = permuted(gated, order, place)
    old_segment = jnp.zeros(b, in_front.dtype) if initial_segment is None else initial_segment.astype(in_front.dtype)
    inputs = jnp.concatenate([old.astype(jnp.float32), moved.astype(jnp.float32)], axis=1)
    segments = jnp.concatenate([jnp.broadcast_to(old_segment[:, None], (b, past)), in_front], axis=1)
    many = past >= UNROLLED
    y = documents_by_blocks(inputs, taps, segments)[:, past:] if many else jnp.zeros((b, t, d), jnp.float32)
    for lag in range(0 if many else past + 1):
        same = shifted(segments, past, lag, t) == in_front
        y = y + taps[lag].astype(jnp.float32) * jnp.where(same[:, :, None], shifted(inputs, past, lag, t), 0)
    y = activated(y, bias, activation)
    if out_gate is None:
        y = zero_padding(permuted(y.astype(x.dtype), place, order), segment_ids)
    else:
        y = zero_padding(permuted(y, place, order), segment_ids) * zero_padding(out_gate, segment_ids).astype(
            jnp.float32
        )
    y = y.astype(x.dtype)
    if not return_state:
        return y, None

    # `inputs` holds the old state, then the valid tokens: the newest `past` of them start at the number of valid
    # tokens.
    rows = jnp.arange(b)[:, None]
    newest = jnp.sum(segment_ids != 0, axis=1)[:, None] + jnp.arange(past)
    state, state_segments = inputs[rows, newest], segments[rows, newest]
    state = jnp.where((state_segments == state_segments[:, -1:])[:, :, None], state, 0)
    return y, state.astype(old.dtype)
