"""The specification: the recurrence of packed features, one token after another, and the series itself as a masked
product of all pairs. In fp32 (fp64 for fp64)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import reference
from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, repeat_heads
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.taylor_attention.features import packed, query_factor


def taylor_attention(
    inputs: Recurrence,
    *,
    normalise: bool = True,
    epsilon: float = 1e-12,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Reads the sums out of the state of `linear_recurrence`; `chunk_size` is not used."""
    out_dtype, dtype = inputs.v.dtype, jnp.promote_types(inputs.v.dtype, jnp.float32)
    # Zeros before the feature map, so that what padding holds does not reach its gradient.
    q, k, v = (zero_padding(x.astype(dtype), inputs.segment_ids) for x in (inputs.q, inputs.k, inputs.v))
    if normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    factor = query_factor(inputs.scale, q.shape[-1])
    features = dataclasses.replace(inputs, q=packed(q * factor), k=packed(k), v=v, scale=1.0)
    sums, state = reference.linear_recurrence(features, return_state=return_state)
    o = sums[..., :-1] / (sums[..., -1:] + epsilon) if normalise else sums
    return zero_padding(o, inputs.segment_ids).astype(out_dtype), state


def quadratic(q, k, v, *, scale, normalise=True, epsilon=1e-12, segment_ids=None) -> jax.Array:
    """Outputs from a zero state, features never formed: weights 1 + s + s^2 / 2 of all pairs (t, t), masked."""
    b, t, h, _ = v.shape
    out_dtype, dtype = v.dtype, jnp.promote_types(v.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    q, k, v = (zero_padding(x.astype(dtype), segments) for x in (q, k, v))
    q, k = (repeat_heads(x, h) for x in (q, k))
    index = jnp.arange(t)
    mask = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
    s = scale * jnp.einsum("bihk,bjhk->bhij", q, k)
    weights = jnp.where(mask[:, None], 1 + s + s**2 / 2, 0)
    if normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + epsilon)
    return jnp.einsum("bhij,bjhv->bihv", weights, v).astype(out_dtype)
