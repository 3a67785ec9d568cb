"""The specification: one token after another with packed features, and the series itself as a masked square. In fp32
(fp64 for fp64)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.taylor_attention.features import count, packed, query_factor


def taylor_attention(
    q,
    k,
    v,
    *,
    scale,
    normalise=True,
    epsilon=1e-12,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """The sums as a state that a scan over tokens carries; `chunk_size` is not used."""
    b, t, h, value_dim = v.shape
    wide = jnp.promote_types(v.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = (segments != 0)[:, :, None, None]
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    q, k, v, dtype = *(jnp.where(real, x.astype(wide), 0) for x in (q, k, v)), v.dtype
    columns = value_dim + int(normalise)
    state = jnp.zeros((b, h, count(k.shape[3]), columns), wide) if initial_state is None else initial_state.astype(wide)
    if segment_ids is None:
        current = jnp.ones(b, jnp.int32)
    else:
        current = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment

    def step(carry, token):
        state, current = carry
        q, k, v, segment = token
        real = segment != 0
        kept = jnp.where((segment == current)[:, None, None, None], state, 0)
        state = jnp.where(real[:, None, None, None], advanced(kept, k, v, normalise), state)
        o = jnp.where(real[:, None, None], read(state, q, scale, normalise, epsilon), 0)
        return (state, jnp.where(real, segment, current)), o

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, segments))
    (state, _), o = jax.lax.scan(step, (state, current), tokens)
    return jnp.moveaxis(o, 0, 1).astype(dtype), state if return_state else None


def advanced(state: jax.Array, k: jax.Array, v: jax.Array, normalise: bool) -> jax.Array:
    """The state (b, h, features, columns) after a token with k (b, h, k) and v (b, h, v)."""
    if normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    return state + packed(k)[..., None] * v[..., None, :]


def read(state: jax.Array, q: jax.Array, scale: float, normalise: bool, epsilon: float) -> jax.Array:
    """What q (b, h, k) reads out of the state, (b, h, v)."""
    sums = jnp.einsum("bhf,bhfv->bhv", packed(q * query_factor(scale, q.shape[-1])), state)
    return sums[..., :-1] / (sums[..., -1:] + epsilon) if normalise else sums


def quadratic(q, k, v, *, scale, normalise=True, epsilon=1e-12, segment_ids=None) -> jax.Array:
    """Outputs from zero state, features never formed: weights 1 + s + s^2 / 2 of all pairs (t, t), masked."""
    b, t, h, _ = v.shape
    wide = jnp.promote_types(v.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    q, k, v, dtype = *(jnp.where(real[:, :, None, None], x.astype(wide), 0) for x in (q, k, v)), v.dtype
    index = jnp.arange(t)
    seen = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
    s = scale * jnp.einsum("bihk,bjhk->bhij", q, k)
    weights = jnp.where(seen[:, None], 1 + s + s**2 / 2, 0)
    if normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + epsilon)
    return jnp.einsum("bhij,bjhv->bihv", weights, v).astype(dtype)
