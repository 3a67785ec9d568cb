"""Merges results of attention over disjoint sets of keys, exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    *parts: tuple[Float[Array, "b t h v"], Float[Array, "b t h"]],
) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h"]]:
    """Returns attention over all keys from its results over disjoint parts of them (FlashAttention, Dao et al. 2022,
    section 3.1).

    Args:
      parts: outputs (b, t, h, v) and log-sum-exps (b, t, h), -inf where a part has nothing that the query sees. A sink
        may have counted in one part only.

    Returns:
      The output in the first part's dtype and the log-sum-exp fp32; zeros and -inf where no part sees anything.
    """
    outputs, lses = zip(*parts, strict=True)
    wide = jnp.promote_types(jnp.float32, lses[0].dtype)
    lse = jnp.stack([x.astype(wide) for x in lses])
    high = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    some = high > -jnp.inf
    high = jnp.where(some, high, 0)
    weights = jnp.exp(lse - high)
    total = jnp.where(some, jnp.sum(weights, axis=0), 1)
    shares = weights / total
    output = sum(x.astype(wide) * share[..., None] for x, share in zip(outputs, shares, strict=True))
    return output.astype(outputs[0].dtype), jnp.where(some, high + jnp.log(total), -jnp.inf)
