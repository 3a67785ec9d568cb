"""The specification, dense: every weight by its definition, in fp32 (fp64 for fp64 inputs), memory (t, s)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.scheduled_attention.block_schedule import pairs_allowed
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.softmax_attention import is_expression
from recollect.pallas_kernels.softmax_attention.scheduled import mask_and_fields


def softmax_attention(
    q, k, v, *, window, mask, sinks, bias, dropout, scale, return_lse, deterministic, **fields
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp; arguments as those of the public function, `fields` those of queries and
    keys."""
    b, t, h, _ = q.shape
    s, groups = k.shape[1:3]
    query_segments, key_segments = fields["query_segments"], fields["key_segments"]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    real = jnp.ones((b, t), bool) if query_segments is None else query_segments != 0
    q = zero_padding(q, query_segments)
    k, v = (zero_padding(x, key_segments) for x in (k, v))
    if is_expression(mask):
        expression, query, key = mask_and_fields(q, k, window=window, mask=mask, **fields)
        mask = jnp.broadcast_to(pairs_allowed(expression, query, key), (b, t, s))
    elif mask is None:
        mask = _causal(
            b, t, s, window, fields["query_positions"], fields["key_positions"], query_segments, key_segments
        )
    seen = (mask & real[:, :, None])[:, None]
    k, v = (jnp.repeat(x.astype(wide), h // groups, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(wide), k) * scale
    scores = jnp.where(seen, scores if bias is None else scores + bias, -jnp.inf)
    if sinks is not None:
        # The sink is one more key, seen by every query that is not padding; its value is zero.
        column = jnp.broadcast_to(sinks.astype(wide)[:, None, None], (b, h, t, 1))
        scores = jnp.concatenate([scores, jnp.where(real[:, None, :, None], column, -jnp.inf)], axis=-1)
    some = jnp.any(scores > -jnp.inf, axis=-1, keepdims=True)
    lse = jax.nn.logsumexp(jnp.where(some, scores, 0), axis=-1, keepdims=True)
    weights = jnp.where(some, jnp.exp(scores - lse), 0)[..., :s]
    if dropout is not None:
        weights = weights * dropout
    out = jnp.einsum("bhts,bshv->bthv", weights, v).astype(q.dtype)
    return out, jnp.moveaxis(jnp.where(some, lse, -jnp.inf)[..., 0], 1, 2)


def _causal(b, t, s, window, query_positions, key_positions, query_segments, key_segments) -> jax.Array:
    i = (jnp.broadcast_to(jnp.arange(t), (b, t)) if query_positions is None else query_positions)[:, :, None]
    j = (jnp.broadcast_to(jnp.arange(s), (b, s)) if key_positions is None else key_positions)[:, None, :]
    seen = j <= i
    if window is not None:
        seen &= i - j < window
    if query_segments is not None:
        seen &= (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments != 0)[:, None, :]
    return seen
