"""The specification: one token after another, complex states as they stand in the equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.segments import segments_before


def modal_recurrence(
    q: jax.Array | None,
    k: jax.Array | None,
    v: jax.Array,
    log_poles: jax.Array,
    residues: jax.Array,
    state: jax.Array | None,
    *,
    segment_ids: jax.Array | None,
    first: jax.Array | None,
    return_state: bool,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Scans over the tokens; one token is a step without a scan. `chunk_size` is not used."""
    b, t, h, value_dim = v.shape
    one = jnp.ones((b, t, h, 1), v.dtype)
    q, k = (one if x is None else x for x in (q, k))
    poles = jnp.exp(log_poles)[:, :, None, None]
    real = starts = jnp.zeros((b, t), bool)
    if segment_ids is None:
        real = ~real
    else:
        real, starts = segment_ids != 0, segment_ids != segments_before(segment_ids, first)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, real, starts = token
        kept = jnp.where(starts[:, None, None, None, None], 0, poles * state)
        after = kept + (k[..., None] * v[..., None, :])[:, :, None]
        state = jnp.where(real[:, None, None, None, None], after, state)
        return state, jnp.einsum("bhk,hn,bhnkv->bhv", q, residues, state).real

    zeros = jnp.zeros((b, h, log_poles.shape[1], k.shape[3], value_dim), jnp.result_type(log_poles, v))
    before = zeros if state is None else _complex(state) if jnp.iscomplexobj(log_poles) else state
    tokens = (q, k, v, real, starts)
    if t == 1:
        after, o = step(before, jax.tree.map(lambda x: x[:, 0], tokens))
        o = o[:, None]
    else:
        after, o = jax.lax.scan(step, before, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
        o = jnp.moveaxis(o, 0, 1)
    if not return_state:
        return o, None
    return o, jnp.concatenate([after.real, after.imag], axis=2) if jnp.iscomplexobj(after) else after


def _complex(state: jax.Array) -> jax.Array:
    return jax.lax.complex(*jnp.split(state, 2, axis=2))
