"""The specification: every pair of tokens, the lag being the valid tokens between them. Memory O(b t^2 d)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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
    k = taps.shape[0]
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    old = jnp.zeros((b, k - 1, d), x.dtype) if initial_state is None else initial_state
    old_segment = jnp.ones(b, segments.dtype) if initial_segment is None else initial_segment
    inputs = _zeroed(x, segments) if in_gate is None else _zeroed(x, segments) * _zeroed(in_gate, segments)
    values = jnp.concatenate([old.astype(inputs.dtype), inputs], axis=1)
    value_segments = jnp.concatenate(
        [jnp.broadcast_to(old_segment[:, None], (b, k - 1)).astype(segments.dtype), segments], axis=1
    )
    ranks = _ranks(segments)
    value_ranks = jnp.concatenate([jnp.broadcast_to(jnp.arange(1 - k, 0), (b, k - 1)), ranks], axis=1)

    y = _pairs(values, taps, ranks, value_ranks, segments, value_segments)
    if bias is not None:
        y = _zeroed(y + bias, segments)
    if activation == "silu":
        y = y * jax.nn.sigmoid(y)
    if out_gate is not None:
        y = y * _zeroed(out_gate, segments)
    if not return_state:
        return y.astype(x.dtype), None

    total = jnp.sum(segments != 0, axis=1)
    known = jnp.concatenate([jnp.ones((b, k - 1), bool), segments != 0], axis=1)
    last = jnp.sum(jnp.where(known & (value_ranks == total[:, None] - 1), value_segments, 0), axis=1)
    ranks_of_state = total[:, None] + jnp.arange(1 - k, 0)
    chosen = (ranks_of_state[:, :, None] == value_ranks[:, None, :]) & (known & (value_segments == last[:, None]))[
        :, None, :
    ]
    state = jnp.einsum("bms,bsd->bmd", chosen.astype(values.dtype), values, precision="highest")
    return y.astype(x.dtype), state.astype(old.dtype)


def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: jax.Array | None, dtype: Any = None) -> jax.Array:
    """See recollect.pallas_kernels.gated_convolution.long.gated; rounds nothing."""
    segments = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    ranks = _ranks(segments)
    return _pairs(_zeroed(x, segments), filter, ranks, ranks, segments, segments)


def _pairs(values, taps, query_ranks, key_ranks, query_segments, key_segments) -> jax.Array:
    lag = query_ranks[:, :, None] - key_ranks[:, None, :]
    reached = (lag >= 0) & (lag < taps.shape[0])
    seen = reached & (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments != 0)[:, :, None]
    weights = jnp.where(seen[..., None], taps.astype(values.dtype)[jnp.where(seen, lag, 0)], 0)
    return jnp.einsum("btsd,bsd->btd", weights, values, precision="highest")


def _ranks(segments: jax.Array) -> jax.Array:
    """Valid tokens before each one, (b, t)."""
    valid = segments != 0
    return jnp.cumsum(valid, axis=1) - valid


def _zeroed(x: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns x without its padding, in fp32 (float64 stays: tests measure errors against it)."""
    return zero_padding(x, segments).astype(jnp.promote_types(x.dtype, jnp.float32))
