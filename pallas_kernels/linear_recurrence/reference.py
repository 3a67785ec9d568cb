"""The specification: one token after another, and the same sum written as a masked square. Both in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def recurrent(
    q,
    k,
    v,
    *,
    log_decay=None,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=64,
) -> tuple[jax.Array, jax.Array | None]:
    """The recurrence as it is defined, by a scan over tokens; `chunk_size` is not used."""
    b, t, h, key_dim = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    g = jnp.zeros((b, t, h), wide) if log_decay is None else jnp.broadcast_to(log_decay, (b, t, h)).astype(wide)
    decay = jnp.exp(jnp.where(real[:, :, None], g, 0))
    state = jnp.zeros((b, h, key_dim, v.shape[3]), wide) if initial_state is None else initial_state.astype(wide)
    if segment_ids is None:
        current = jnp.ones(b, jnp.int32)
    else:
        current = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment

    def step(carry, token):
        state, current = carry
        q_t, k_t, v_t, decay_t, segment = token
        real = segment != 0
        kept = jnp.where((segment == current)[:, None, None, None], decay_t[:, :, None, None] * state, 0)
        written = kept + k_t[..., :, None] * v_t[..., None, :]
        state = jnp.where(real[:, None, None, None], written, state)
        o_t = jnp.where(real[:, None, None], jnp.einsum("bhk,bhkv->bhv", q_t * scale, state), 0)
        return (state, jnp.where(real, segment, current)), o_t

    inputs = (jnp.where(real[:, :, None, None], y.astype(wide), 0) for y in (q, k, v))
    rows = tuple(jnp.moveaxis(x, 1, 0) for x in (*inputs, decay, segments))
    (state, _), o = jax.lax.scan(step, (state, current), rows)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state if return_state else None


def quadratic(q, k, v, *, log_decay=None, scale=1.0, segment_ids=None) -> jax.Array:
    """The same outputs from zero state as one masked (t, t) product: o_i = sum_{j<=i} exp(G_i - G_j) (scale q_i . k_j) v_j."""
    b, t, h, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    q, k, v = (jnp.where(real[:, :, None, None], x.astype(wide), 0) for x in (q, k, v))
    g = jnp.zeros((b, t, h), wide) if log_decay is None else jnp.broadcast_to(log_decay, (b, t, h)).astype(wide)
    total = jnp.cumsum(jnp.where(real[:, :, None], g, 0), axis=1)
    index = jnp.arange(t)
    seen = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & real[:, :, None]
    exponent = jnp.where(seen[..., None], total[:, :, None] - total[:, None, :], -jnp.inf)
    weights = jnp.einsum("bihk,bjhk->bijh", q * scale, k) * jnp.exp(exponent)
    return jnp.einsum("bijh,bjhv->bihv", weights, v)
