"""The specification, dense: every weight by its definition, in fp32 (fp64 for fp64 inputs), memory (t, s)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def weights(
    q, k, *, block, query_positions, key_positions, query_segments, key_segments, scale
) -> tuple[jax.Array, jax.Array]:
    """(b, h, t, s) attention weights; rows sum to 1 (0 for padded queries), landmark columns are 0. And the
    log-sum-exp (b, h, t)."""
    b, t, h, _ = q.shape
    s, groups = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k = jnp.repeat(k, h // groups, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(wide), k.astype(wide)) * scale
    i = jnp.broadcast_to(jnp.arange(t), (b, t)) if query_positions is None else query_positions
    j = jnp.broadcast_to(jnp.arange(s), (b, s)) if key_positions is None else key_positions
    own, theirs = (i // (block + 1))[:, :, None], (j // (block + 1))[:, None, :]
    is_landmark = (j % (block + 1) == block)[:, None, :]
    seen = j[:, None, :] <= i[:, :, None]
    if query_segments is not None:
        seen &= (query_segments[:, :, None] == key_segments[:, None, :]) & (query_segments != 0)[:, :, None]
    main = seen & jnp.where(is_landmark, theirs < own, theirs == own)
    p_main, lse = _softmax(scores, main[:, None])
    total = jnp.where(main & ~is_landmark, 1.0, 0.0)[:, None] * p_main
    # One earlier block after another: block number n of the query's document.
    for n in range((s - 1) // (block + 1) + 1):
        ordinary = seen & ~is_landmark & (theirs == n) & (theirs < own)
        gate = jnp.sum(jnp.where((main & is_landmark & (theirs == n))[:, None], p_main, 0), axis=-1, keepdims=True)
        total = total + gate * _softmax(scores, ordinary[:, None])[0]
    return total, lse


def landmark_attention(
    q, k, v, *, block, query_positions, key_positions, query_segments, key_segments, scale, self_attention=False
) -> tuple[jax.Array, jax.Array]:
    """See the front door for the arguments; returns the output and the log-sum-exp of the main group."""
    if query_segments is not None:
        q = jnp.where((query_segments != 0)[:, :, None, None], q, 0)
        k, v = (jnp.where((key_segments != 0)[:, :, None, None], x, 0) for x in (k, v))
    w, lse = weights(
        q,
        k,
        block=block,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=scale,
    )
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshv->bthv", w, v.astype(w.dtype)).astype(q.dtype), jnp.moveaxis(lse, 1, 2)


def _softmax(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the masked-in entries of the last axis, and the logarithm of its denominator; zeros and -inf
    where there are none."""
    low = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
    low = jax.lax.stop_gradient(jnp.where(jnp.isfinite(low), low, 0))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - low, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return weights / total, jnp.where(some, low + jnp.log(total), -jnp.inf)[..., 0]
