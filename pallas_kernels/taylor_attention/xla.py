"""Taylor attention in chunks: inside a chunk 1 + s + s^2 / 2 of scores, as update; packed features only for reading and
writing the state.

A scan over chunks carries the state (features x columns). Its body is recomputed in the gradient, which keeps one state
per chunk: the features of more than one chunk never exist at once, and memory is linear in length.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.recurrence import (
    Recurrence,
    in_whole_chunks,
    repeat_heads,
    without_padding,
)
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.taylor_attention.features import count, packed, query_factor

CHUNK = 64  # where, on CPUs, a chunk's scores cost what its reading and writing of the state cost


def taylor_attention(
    inputs: Recurrence,
    *,
    normalise: bool = True,
    epsilon: float = 1e-12,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the operation chunk by chunk; see `taylor_attention` of the package."""
    b, t, h, value_dim = inputs.v.shape
    segment_ids = inputs.segment_ids
    out_dtype, dtype = inputs.v.dtype, jnp.promote_types(inputs.v.dtype, jnp.float32)
    if normalise:
        # A key of zeros still weighs 1: padding is kept out by its values, the normaliser's among them.
        ones = jnp.ones_like(inputs.v[..., :1])
        inputs = dataclasses.replace(inputs, v=jnp.concatenate([inputs.v, ones], axis=-1))
    c = min(chunk_size or CHUNK, t)
    n = -(-t // c)
    inputs = in_whole_chunks(without_padding(inputs), c)
    q, k = (repeat_heads(x, h) for x in (inputs.q, inputs.k))
    chunks = [x.reshape(b, n, c, h, -1).transpose(1, 0, 3, 2, 4) for x in (q, k, inputs.v)]
    chunks.append(None if segment_ids is None else inputs.segment_ids.reshape(b, n, c).swapaxes(0, 1))
    state = None if inputs.initial_state is None else inputs.initial_state.astype(dtype)
    first = None if segment_ids is None else inputs.initial_segment
    step = functools.partial(_step, scale=inputs.scale, dtype=dtype)
    if n == 1:
        (state, _), sums = step((state, first), [x if x is None else x[0] for x in chunks], writes=return_state)
        sums = sums[None]
    else:
        if state is None:
            state = jnp.zeros((b, h, count(k.shape[3]), inputs.v.shape[3]), dtype)
        (state, _), sums = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (state, first), chunks)
    sums = sums.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, -1)[:, :t]
    o = sums[..., :value_dim] / (sums[..., value_dim:] + epsilon) if normalise else sums
    return zero_padding(o, segment_ids).astype(out_dtype), state if return_state else None


def _step(carry, chunk, *, scale, dtype, writes=True):
    """One chunk: the carry (state, segment it belongs to; each may be None) after it, and the weighted sums of values (b,
    h, c, columns)."""
    state, current = carry
    q, k, v, segments = chunk
    index = jnp.arange(q.shape[2])
    mask = index[:, None] >= index
    if segments is not None:
        mask = (mask & (segments[:, :, None] == segments[:, None, :]))[:, None]
    s = scale * jnp.einsum("bhik,bhjk->bhij", q, k, preferred_element_type=dtype)
    weights = jnp.where(mask, 1 + s + 0.5 * s * s, 0)
    sums = jnp.einsum("bhij,bhjv->bhiv", weights.astype(v.dtype), v, preferred_element_type=dtype)
    if state is not None:
        queries = packed(q.astype(dtype) * query_factor(scale, q.shape[3]))
        if segments is not None:
            queries = jnp.where((segments == current[:, None])[:, None, :, None], queries, 0)
        sums = sums + jnp.einsum("bhif,bhfv->bhiv", queries, state)
    if not writes:
        return (None, None), sums
    v = v.astype(dtype)
    if segments is not None:
        last = segments[:, -1]
        v = jnp.where((segments == last[:, None])[:, None, :, None], v, 0)
        state = None if state is None else jnp.where((last == current)[:, None, None, None], state, 0)
        current = last
    update = jnp.einsum("bhjf,bhjv->bhfv", packed(k.astype(dtype)), v)
    return (update if state is None else state + update, current), sums
