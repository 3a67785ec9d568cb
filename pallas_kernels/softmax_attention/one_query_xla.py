"""One query per key head, as when decoding on a GPU: sums of products, which read keys and values where they lie, while
a matrix product of one row would first copy the whole cache, heads before slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax


def attend_one(q, k, v, allowed, scale, sinks, bias) -> tuple[jax.Array, jax.Array]:
    """Returns what `xla.attend` does of a query (..., 1, g, 1, k), the other arguments as there."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.sum(q[..., 0, :].astype(wide) * k.astype(wide), axis=-1) * scale  # (..., s, g)
    scores = jnp.swapaxes(scores, -1, -2)[..., None, None, :]
    scores = scores if bias is None else scores + bias
    weights, total, lse = unnormalised_softmax(jnp.where(allowed[..., None, :, None, :], scores, -jnp.inf), sinks)
    share = jnp.swapaxes((weights / total[..., None])[..., 0, 0, :], -1, -2)  # (..., s, g)
    out = jnp.sum(share[..., None] * v.astype(wide), axis=-3)
    return out[..., None, :, None, :], jnp.swapaxes(lse, -3, -2)
