"""The specification, dense: every head for every token by softmax attention's specification, then what is not chosen
set to zero."""

from __future__ import annotations

import jax.numpy as jnp

from recollect.pallas_kernels.softmax_attention import softmax_attention


def head_mixture_attention(
    q, k, v, chosen, *, active, key_heads, query_positions, key_positions, query_segments, key_segments, scale
):
    """See the front door for the arguments; returns the output and the log-sum-exp."""
    k, v = (x[:, :, list(key_heads)] for x in (k, v))
    out, lse = softmax_attention(
        q,
        k,
        v,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=scale,
        return_lse=True,
        backend="reference",
    )
    return jnp.where(chosen[..., None], out, 0), jnp.where(chosen, lse, -jnp.inf)
