"""The short convolution for XLA: one shifted multiply-add per tap, which XLA fuses into one loop over x.

Rows of several documents: short_packed_xla.py. More than 16 taps: short_blocks_xla.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

UNROLLED = 16


def short_convolution(x, taps, bias, *, segment_ids, initial_segment, **settings) -> tuple[jax.Array, jax.Array | None]:
    """See recollect.pallas_kernels.gated_convolution."""
    if segment_ids is None:
        return _one_document(x, taps, bias, **settings)
    from recollect.pallas_kernels.gated_convolution.short_packed_xla import packed

    return packed(x, taps, bias, segment_ids, initial_segment, **settings)


def _one_document(
    x, taps, bias, *, in_gate, out_gate, activation, initial_state, return_state
) -> tuple[jax.Array, jax.Array | None]:
    b, t, d = x.shape
    past = taps.shape[0] - 1
    old = jnp.zeros((b, past, d), x.dtype) if initial_state is None else initial_state
    gated = x if in_gate is None else x.astype(jnp.float32) * in_gate.astype(jnp.float32)
    inputs = jnp.concatenate([old.astype(jnp.float32), gated.astype(jnp.float32)], axis=1)
    if past >= UNROLLED:
        from recollect.pallas_kernels.gated_convolution.short_blocks_xla import by_blocks

        y = by_blocks(gated.astype(jnp.float32) if initial_state is None else inputs, taps)[:, -t:]
        lags = range(0)
    else:
        y, lags = jnp.zeros((b, t, d), jnp.float32), range(past + 1)
    for lag in lags:
        # Without a state, shifts of x itself: XLA on CPU is several times slower where a gradient flows into a
        # concatenation.
        past_inputs = _delayed(gated, lag) if initial_state is None else shifted(inputs, past, lag, t)
        y = y + taps[lag].astype(jnp.float32) * past_inputs
    y = activated(y, bias, activation)
    if out_gate is not None:
        y = y * out_gate.astype(jnp.float32)
    return y.astype(x.dtype), inputs[:, t:].astype(old.dtype) if return_state else None


def activated(y: jax.Array, bias: jax.Array | None, activation: str) -> jax.Array:
    """Returns the activation of y + bias."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return jax.nn.silu(y) if activation == "silu" else y


def shifted(inputs: jax.Array, past: int, lag: int, length: int) -> jax.Array:
    """Returns the inputs `lag` tokens before each of `length` tokens, which `past` inputs precede."""
    return jax.lax.slice_in_dim(inputs, past - lag, past - lag + length, axis=1)


def _delayed(x: jax.Array, lag: int) -> jax.Array:
    """x moved `lag` tokens towards the end, zeros before it, in fp32."""
    t = x.shape[1]
    lag = min(lag, t)
    return jnp.pad(x[:, : t - lag].astype(jnp.float32), ((0, 0), (lag, 0), (0, 0)))
