"""The specification: one token after another, and the same sum as a masked product of all pairs, in fp32 (fp64 for
fp64)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.recurrence import (
    Recurrence,
    by_channel,
    repeat_heads,
    with_strength,
    without_padding,
)
from recollect.pallas_kernels.segments import document_numbers


def linear_recurrence(
    inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scans over the tokens, by the definition; one token is a step without a scan. `chunk_size` is not used."""
    b, t, h, value_dim = inputs.v.shape
    segment_ids = inputs.segment_ids
    out_dtype, dtype = inputs.v.dtype, jnp.promote_types(inputs.v.dtype, jnp.float32)
    inputs = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
    inputs = with_strength(without_padding(inputs))
    q, k = (repeat_heads(x, h) for x in (inputs.q, inputs.k))
    rows = {"q": inputs.scale * q, "k": k, "v": inputs.v}
    if inputs.log_decay is not None:
        g = by_channel(inputs.log_decay, dtype)
        rows["g"] = jnp.broadcast_to(g, (b, t, h, g.shape[-1]))
    if inputs.value_log_decay is not None:
        rows["c"] = inputs.value_log_decay
    if inputs.erase_read is not None:
        rows |= {"e": inputs.erase_read, "u": k if inputs.erase_write is None else inputs.erase_write}
    state = inputs.initial_state
    state = jnp.zeros((b, h, q.shape[3], value_dim), dtype) if state is None else state
    continues = numbers = None
    if inputs.by_document:
        numbers = document_numbers(segment_ids)
    elif inputs.segment_ids is not None:
        before = jnp.concatenate([inputs.initial_segment[:, None], inputs.segment_ids[:, :-1]], axis=1)
        continues = inputs.segment_ids == before

    def step(state, token):
        x, continues, number = token
        if number is not None:
            # One of the documents' states; NaN where a row has more documents than states.
            place = jnp.arange(b), number
            one = _advance(state.at[place].get(mode="fill", fill_value=jnp.nan), x, inputs.erase_before_decay)
            return state.at[place].set(one, mode="drop"), jnp.einsum("bhk,bhkv->bhv", x["q"], one)
        if continues is not None:
            state = jnp.where(continues[:, None, None, None], state, 0)
        state = _advance(state, x, inputs.erase_before_decay)
        # A sum of products: one pass both advances the state and reads it, which a matrix product would read again.
        return state, jnp.sum(x["q"][..., None] * state, axis=-2)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (rows, continues, numbers))
    if t == 1:
        state, o = step(state, jax.tree.map(lambda x: x[0], tokens))
        o = o[None]
    else:
        state, o = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(out_dtype), state if return_state else None


def _advance(state: jax.Array, x: Mapping[str, jax.Array], erase_before_decay: bool) -> jax.Array:
    """The state after a token with k (b, h, k), v (b, h, v) and, where there are any, e, u (b, h, k) and decays g and c
    of rows and columns."""
    before = state
    if "g" in x:
        state = jnp.exp(x["g"])[..., None] * state
    if "c" in x:
        state = jnp.exp(x["c"])[..., None, :] * state
    update = x["k"][..., None] * x["v"][..., None, :]
    if "e" in x:
        erased = jnp.einsum("bhk,bhkv->bhv", x["e"], before if erase_before_decay else state)
        update = update - x["u"][..., None] * erased[..., None, :]
    return state + update


def quadratic(q, k, v, *, log_decay=None, scale=1.0, segment_ids=None) -> jax.Array:
    """Outputs from a zero state, nothing erased, as one masked (t, t) product per channel:

    o_i = sum_{j<=i} (scale sum_c q_ic exp(G_ic - G_jc) k_jc) v_j.
    """
    b, t, h, _ = v.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    segments = jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    real = segments != 0
    q, k, v = (jnp.where(real[:, :, None, None], x.astype(dtype), 0) for x in (q, k, v))
    q, k = (repeat_heads(x, h) for x in (q, k))
    index = jnp.arange(t)
    mask = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & real[:, :, None]
    if log_decay is None:
        weights = jnp.where(mask[..., None], jnp.einsum("bihk,bjhk->bijh", q * scale, k), 0)
        return jnp.einsum("bijh,bjhv->bihv", weights, v)
    g = jnp.broadcast_to(by_channel(log_decay, dtype), (b, t, h, log_decay.shape[3] if log_decay.ndim == 4 else 1))
    total = jnp.cumsum(jnp.where(real[:, :, None, None], g, 0), axis=1)
    decay = jnp.exp(jnp.where(mask[..., None, None], total[:, :, None] - total[:, None, :], -jnp.inf))
    if decay.shape[-1] == 1:
        weights = jnp.einsum("bihk,bjhk->bijh", q * scale, k) * decay[..., 0]
    else:
        weights = jnp.einsum("bihk,bjhk,bijhk->bijh", q * scale, k, decay)
    return jnp.einsum("bijh,bjhv->bihv", weights, v)
