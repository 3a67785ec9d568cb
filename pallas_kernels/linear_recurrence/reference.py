"""The specification: one token after another, and the same sum written as a masked square. Both in fp32 (fp64 for
fp64 inputs)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_recurrence(
    q,
    k,
    v,
    *,
    log_decay=None,
    value_log_decay=None,
    write_strength=None,
    erase_read=None,
    erase_write=None,
    erase_before_decay=False,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """The recurrence as it is defined, by a scan over tokens; `chunk_size` is not used."""
    b, t, h, value_dim = v.shape
    key_dim = q.shape[3]
    wide = jnp.promote_types(v.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = (segments != 0)[:, :, None, None]
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    rows = {"q": q, "k": k, "v": v}
    if write_strength is not None:
        rows["w"] = by_channel(write_strength, wide)
    if log_decay is not None:
        rows["g"] = jnp.broadcast_to(by_channel(log_decay, wide), (b, t, h, key_dim))
    if value_log_decay is not None:
        rows["c"] = value_log_decay
    if erase_read is not None:
        rows |= {"e": erase_read, "u": k if erase_write is None else erase_write}
    rows = {name: jnp.where(real, x.astype(wide), 0) for name, x in rows.items()}
    if "w" in rows:
        rows["v"] = rows.pop("w") * rows["v"]
    state = jnp.zeros((b, h, key_dim, value_dim), wide) if initial_state is None else initial_state.astype(wide)
    if segment_ids is None:
        current = jnp.ones(b, jnp.int32)
    else:
        current = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment

    def step(carry, token):
        state, current = carry
        x, segment = token
        real = segment != 0
        kept = jnp.where((segment == current)[:, None, None, None], state, 0)
        after = advanced(kept, x, erase_before_decay)
        state = jnp.where(real[:, None, None, None], after, state)
        o_t = jnp.where(real[:, None, None], jnp.einsum("bhk,bhkv->bhv", x["q"] * scale, state), 0)
        return (state, jnp.where(real, segment, current)), o_t

    tokens = ({name: jnp.moveaxis(x, 1, 0) for name, x in rows.items()}, jnp.moveaxis(segments, 1, 0))
    (state, _), o = jax.lax.scan(step, (state, current), tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state if return_state else None


def advanced(state: jax.Array, x: dict[str, jax.Array], erase_before_decay: bool = False) -> jax.Array:
    """The state (b, h, k, v) after one token: k, v (b, h, k | v), optionally g (b, h, k), c (b, h, v), and e with u
    (b, h, k)."""
    before = state
    if "g" in x:
        state = jnp.exp(x["g"])[..., None] * state
    if "c" in x:
        state = state * jnp.exp(x["c"])[..., None, :]
    written = x["k"][..., None] * x["v"][..., None, :]
    if "e" in x:
        erased = jnp.einsum("bhk,bhkv->bhv", x["e"], before if erase_before_decay else state)
        written = written - x["u"][..., None] * erased[..., None, :]
    return state + written


def by_channel(x: jax.Array, wide) -> jax.Array:
    """A number per head (h,), per head and token (b, t, h), or per channel (b, t, h, d), as something that
    broadcasts over (b, t, h, d)."""
    return (x if x.ndim == 4 else x[..., None]).astype(wide)


def quadratic(q, k, v, *, log_decay=None, scale=1.0, segment_ids=None) -> jax.Array:
    """Outputs from zero state, nothing erased, as one masked (t, t) product a channel:

    o_i = sum_{j<=i} (scale sum_c q_ic exp(G_ic - G_jc) k_jc) v_j.
    """
    b, t, h, _ = v.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    q, k, v = (jnp.where(real[:, :, None, None], x.astype(wide), 0) for x in (q, k, v))
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    index = jnp.arange(t)
    seen = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & real[:, :, None]
    if log_decay is None:
        weights = jnp.where(seen[..., None], jnp.einsum("bihk,bjhk->bijh", q * scale, k), 0)
        return jnp.einsum("bijh,bjhv->bihv", weights, v)
    g = jnp.broadcast_to(by_channel(log_decay, wide), (b, t, h, log_decay.shape[3] if log_decay.ndim == 4 else 1))
    total = jnp.cumsum(jnp.where(real[:, :, None, None], g, 0), axis=1)
    decay = jnp.exp(jnp.where(seen[..., None, None], total[:, :, None] - total[:, None, :], -jnp.inf))
    if decay.shape[-1] == 1:
        weights = jnp.einsum("bihk,bjhk->bijh", q * scale, k) * decay[..., 0]
    else:
        weights = jnp.einsum("bihk,bjhk,bijhk->bijh", q * scale, k, decay)
    return jnp.einsum("bijh,bjhv->bihv", weights, v)
