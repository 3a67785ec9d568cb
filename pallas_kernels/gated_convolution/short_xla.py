"""The short convolution for XLA: one shifted multiply-add per tap, which XLA fuses into one loop over x.

With segments, valid tokens are first moved to the front of their row and put back at the end, so that padding in the
middle of a document leaves no holes in the count of lags.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import compaction, permuted, taken
from recollect.pallas_kernels.segments import zero_padding


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None,
    *,
    in_gate: jax.Array | None,
    out_gate: jax.Array | None,
    activation: str,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    return_state: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See recollect.pallas_kernels.gated_convolution."""
    b, t, d = x.shape
    past = taps.shape[0] - 1
    old = jnp.zeros((b, past, d), x.dtype) if initial_state is None else initial_state
    state_dtype = old.dtype
    if segment_ids is None:
        gated = x if in_gate is None else x.astype(jnp.float32) * in_gate.astype(jnp.float32)
        inputs = jnp.concatenate([old.astype(jnp.float32), gated.astype(jnp.float32)], axis=1)
        y = jnp.zeros((b, t, d), jnp.float32)
        for lag in range(past + 1):
            # Without a state, shifts of x itself: XLA on CPU is several times slower where a gradient flows into a
            # concatenation.
            past_inputs = _delayed(gated, lag) if initial_state is None else _shifted(inputs, past, lag, t)
            y = y + taps[lag].astype(jnp.float32) * past_inputs
        y = _activated(y, bias, activation)
        if out_gate is not None:
            y = y * out_gate.astype(jnp.float32)
        state = inputs[:, t:].astype(state_dtype) if return_state else None
        return y.astype(x.dtype), state

    order, place = compaction(segment_ids)
    packed = taken(segment_ids, order)
    gated = zero_padding(x, segment_ids)
    if in_gate is not None:
        gated = gated.astype(jnp.float32) * zero_padding(in_gate, segment_ids).astype(jnp.float32)
    moved = permuted(gated, order, place)
    old_segment = jnp.zeros(b, packed.dtype) if initial_segment is None else initial_segment.astype(packed.dtype)
    inputs = jnp.concatenate([old.astype(jnp.float32), moved.astype(jnp.float32)], axis=1)
    segments = jnp.concatenate([jnp.broadcast_to(old_segment[:, None], (b, past)), packed], axis=1)
    y = jnp.zeros((b, t, d), jnp.float32)
    for lag in range(past + 1):
        same = _shifted(segments, past, lag, t) == packed
        y = y + taps[lag].astype(jnp.float32) * jnp.where(same[:, :, None], _shifted(inputs, past, lag, t), 0)
    y = _activated(y, bias, activation)
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
    return y, state.astype(state_dtype)


def _activated(y: jax.Array, bias: jax.Array | None, activation: str) -> jax.Array:
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return jax.nn.silu(y) if activation == "silu" else y


def _shifted(inputs: jax.Array, past: int, lag: int, length: int) -> jax.Array:
    return jax.lax.slice_in_dim(inputs, past - lag, past - lag + length, axis=1)


def _delayed(x: jax.Array, lag: int) -> jax.Array:
    """x moved `lag` tokens towards the end, zeros before it, in fp32."""
    t = x.shape[1]
    lag = min(lag, t)
    return jnp.pad(x[:, : t - lag].astype(jnp.float32), ((0, 0), (lag, 0), (0, 0)))
