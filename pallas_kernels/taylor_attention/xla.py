"""The chunked form: inside a chunk 1 + s + s^2 / 2 of scores, as written; packed features only for reading and writing
the state.

A scan over chunks carries the state (features x columns). Its body is recomputed in the gradient, which keeps one state
a chunk: the features of more than one chunk never exist at once, and memory is linear in length.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.segments import carry_segments
from recollect.pallas_kernels.taylor_attention.features import count, packed, query_factor

CHUNK = 64  # where, on CPUs, a chunk's scores cost what its reading and writing of the state cost


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
    """See the front door for the arguments."""
    b, t, h, value_dim = v.shape
    dtype, wide = v.dtype, jnp.promote_types(v.dtype, jnp.float32)
    if normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    q, k = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (q, k))
    first = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment
    segments = real = None
    if segment_ids is not None:
        # A key of zeros still weighs 1: padding is kept out by its values, the normaliser's among them.
        real = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        segments = carry_segments(segment_ids, first)
    c = min(chunk_size or CHUNK, t)
    n = -(-t // c)
    if n * c > t:
        q, k, v = (jnp.pad(x, ((0, 0), (0, n * c - t), (0, 0), (0, 0))) for x in (q, k, v))
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, n * c - t)), mode="edge")
    chunks = [x.reshape(b, n, c, h, -1).transpose(1, 0, 3, 2, 4) for x in (q, k, v)]
    chunks.append(None if segments is None else segments.reshape(b, n, c).swapaxes(0, 1))

    state = None if initial_state is None else initial_state.astype(wide)
    step = functools.partial(_step, scale=scale, wide=wide)
    if n == 1:
        (state, _), sums = step((state, first), [x if x is None else x[0] for x in chunks], writes=return_state)
        sums = sums[None]
    else:
        if state is None:
            state = jnp.zeros((b, h, count(k.shape[3]), v.shape[3]), wide)
        (state, _), sums = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (state, first), chunks)
    sums = sums.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, -1)[:, :t]
    o = sums[..., :value_dim] / (sums[..., value_dim:] + epsilon) if normalise else sums
    o = (o if real is None else jnp.where(real, o, 0)).astype(dtype)
    return o, state if return_state else None


def _step(carry, chunk, *, scale, wide, writes=True):
    """One chunk: the carry (state | None, segment it belongs to) after it, and the weighted sums of values (b, h, c,
    columns)."""
    state, current = carry
    q, k, v, segments = chunk
    index = jnp.arange(q.shape[2])
    seen = index[:, None] >= index
    if segments is not None:
        seen = (seen & (segments[:, :, None] == segments[:, None, :]))[:, None]
    s = scale * jnp.einsum("bhik,bhjk->bhij", q, k, preferred_element_type=wide)
    weights = jnp.where(seen, 1 + s + 0.5 * s * s, 0)
    sums = jnp.einsum("bhij,bhjv->bhiv", weights.astype(v.dtype), v, preferred_element_type=wide)
    if state is not None:
        queries = packed(q.astype(wide) * query_factor(scale, q.shape[3]))
        if segments is not None:
            queries = jnp.where((segments == current[:, None])[:, None, :, None], queries, 0)
        sums = sums + jnp.einsum("bhif,bhfv->bhiv", queries, state)
    if not writes:
        return (None, None), sums
    v = v.astype(wide)
    if segments is not None:
        last = segments[:, -1]
        v = jnp.where((segments == last[:, None])[:, None, :, None], v, 0)
        state = None if state is None else jnp.where((last == current)[:, None, None, None], state, 0)
        current = last
    written = jnp.einsum("bhjf,bhjv->bhfv", packed(k.astype(wide)), v)
    return (written if state is None else state + written, current), sums
