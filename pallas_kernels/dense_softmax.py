"""Softmax attention over all keys that are given: what the plain forms of the softmax family multiply.

Matrix products run in the inputs' dtype and accumulate in fp32 (fp64 for fp64); the softmax is fp32, and divides after
the product with the values (v columns instead of s), so that one (t, s) array is kept for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float, sinks: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention of grouped queries. Scores are laid out (..., g, t, r, s) with r query heads a key head, the order in
    which the product yields them.

    Args:
      q: (..., t, g, r, k).
      k, v: (..., s, g, k) and (..., s, g, v).
      allowed: broadcasts to (..., t, s).
      sinks: (g, 1, r) logits that take weight and give no value, or None.

    Returns:
      outputs (..., t, g, r, v) and log-sum-exps (..., t, g, r), fp32 or wider; 0 and -inf where nothing is seen.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...tgrk,...sgk->...gtrs", q, k, preferred_element_type=wide) * scale
    weights, total, lse = unnormalised_softmax(jnp.where(allowed[..., None, :, None, :], scores, -jnp.inf), sinks)
    out = (
        jnp.einsum("...gtrs,...sgv->...gtrv", weights.astype(v.dtype), v, preferred_element_type=wide)
        / total[..., None]
    )
    return jnp.swapaxes(out, -4, -3), jnp.swapaxes(lse, -3, -2)


def unnormalised_softmax(scores: jax.Array, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax over the last axis before its division: weights (..., s), the sums (...) that divide them, and
    log-sum-exps (...).

    A row of -inf has weights 0, sum 1 and log-sum-exp -inf.

    Args:
      scores: (..., s), -inf where nothing is seen.
      sinks: logits that broadcast to (...) and count in the sums, or None.
    """
    # The shift cancels, so no gradient need pass through it; it is finite also where nothing is seen.
    high = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(scores.dtype).min)
    if sinks is not None:
        high = jnp.maximum(high, sinks.astype(scores.dtype))
    high = jax.lax.stop_gradient(high)
    weights = jnp.exp(scores - high[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(scores.dtype) - high)
    some = total > 0
    total = jnp.where(some, total, 1)
    return weights, total, jnp.where(some, high + jnp.log(total), -jnp.inf)
