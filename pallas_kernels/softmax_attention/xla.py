"""Dense products over visible keys, by one of four methods: all keys; for self-attention blocks of queries against the
keys stored up to their end; for windowed self-attention the bands of banded_xla.py; for mask expressions the tiles of
scheduled_xla.py.

Matrix products run in the inputs' dtype and accumulate in fp32 (fp64 for fp64); the softmax is fp32, and divides after
the product with the values (v columns instead of s), so that one (t, s) array is kept for the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import device
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.softmax_attention import is_expression, is_self_attention

QUERY_BLOCK = 128
"""Queries per block of the causal method, at least; two CPU cores at (8, 512, 4, 32) take 42 ms for value and gradient
against 63 in one block."""

MOST_BLOCKS = 16
"""Blocks are unrolled in the program: longer sequences get longer blocks."""

SMALLEST_BAND = 32
"""Queries per block of the banded method, at least: smaller windows make products too small to be fast."""


def softmax_attention(
    q, k, v, *, window, mask, sinks, bias, dropout, scale, return_lse, deterministic, **fields
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp; arguments as those of the public function, `fields` those of queries and
    keys."""
    b, t, h, _ = q.shape
    groups = k.shape[2]
    self_attention = is_self_attention(q, k, fields)
    query_positions, query_segments, key_segments = (
        fields[name] for name in ("query_positions", "query_segments", "key_segments")
    )
    if query_segments is not None:
        q, k, v = zero_padding(q, query_segments), zero_padding(k, key_segments), zero_padding(v, key_segments)
    dtype = q.dtype
    q = q.reshape(b, t, groups, h // groups, -1)
    if sinks is not None:
        sinks = sinks.reshape(groups, 1, h // groups)
    if bias is not None or dropout is not None:
        from recollect.pallas_kernels.softmax_attention.pairwise_xla import pairwise

        out, lse = pairwise(q, k, v, bias, dropout, sinks, scale, window=window, mask=mask, **fields)
    elif is_expression(mask):
        from recollect.pallas_kernels.softmax_attention.scheduled_xla import by_schedule

        out, lse = by_schedule(q, k, v, sinks, scale, window=window, mask=mask, **fields)
    elif mask is not None:
        if query_segments is not None:
            mask = mask & (query_segments != 0)[:, :, None]
        out, lse = attend(q, k, v, mask, scale, sinks)
    elif not self_attention:
        allowed = causal_pairs(
            _positions(q, query_positions), query_segments, _positions(k, fields["key_positions"]), key_segments, window
        )
        out, lse = attend(q, k, v, allowed, scale, sinks)
    elif window is not None and t > 2 * max(window, SMALLEST_BAND):
        from recollect.pallas_kernels.softmax_attention.banded_xla import banded

        out, lse = banded(q, k, v, window, query_positions, query_segments, sinks, scale)
    else:
        out, lse = _triangular(q, k, v, window, query_positions, query_segments, sinks, scale)
    if sinks is not None and query_segments is not None:
        lse = jnp.where((query_segments != 0)[:, :, None, None], lse, -jnp.inf)
    return out.astype(dtype).reshape(b, t, h, -1), lse.reshape(b, t, h)


def _positions(x, positions) -> jax.Array:
    return jnp.arange(x.shape[1])[None] if positions is None else positions


def causal_pairs(i, query_segments, j, key_segments, window) -> jax.Array:
    """Returns the causal mask of positions i (..., t) and j (..., s): (..., t, s) bool."""
    distance = i[..., :, None] - j[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if query_segments is not None:
        allowed &= (query_segments[..., :, None] == key_segments[..., None, :]) & (query_segments != 0)[..., :, None]
    return allowed


def _triangular(q, k, v, window, positions, segments, sinks, scale):
    """Blocks of queries, each against the keys stored up to its end."""
    t = q.shape[1]
    i = _positions(q, positions)
    size = max(QUERY_BLOCK, -(-t // MOST_BLOCKS))
    parts = []
    for start in range(0, t, size):
        end = min(start + size, t)
        of_queries, of_keys = (None, None) if segments is None else (segments[:, start:end], segments[:, :end])
        allowed = causal_pairs(i[:, start:end], of_queries, i[:, :end], of_keys, window)
        parts.append(attend(q[:, start:end], k[:, :end], v[:, :end], allowed, scale, sinks))
    return tuple(jnp.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True))


def attend(q, k, v, allowed, scale, sinks=None, bias=None, dropout=None) -> tuple[jax.Array, jax.Array]:
    """Returns the attention of grouped queries. Scores are laid out (..., g, t, r, s) with r query heads per key head,
    the order in which the product yields them.

    Args:
      q: (..., t, g, r, k).
      k, v: (..., s, g, k) and (..., s, g, v).
      allowed: broadcasts to (..., t, s).
      sinks: (g, 1, r) logits that take weight and give no value, or None.
      bias, dropout: broadcast to the scores, (..., g, t, r, s), or None.

    Returns:
      outputs (..., t, g, r, v) and log-sum-exps (..., t, g, r), fp32 or wider; 0 and -inf where a query sees no key.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if q.shape[-4] == q.shape[-2] == 1 and dropout is None and device().platform == "gpu":
        from recollect.pallas_kernels.softmax_attention.one_query_xla import attend_one

        return attend_one(q, k, v, allowed, scale, sinks, bias)
    scores = jnp.einsum("...tgrk,...sgk->...gtrs", q, k, preferred_element_type=wide) * scale
    scores = scores if bias is None else scores + bias
    weights, total, lse = unnormalised_softmax(jnp.where(allowed[..., None, :, None, :], scores, -jnp.inf), sinks)
    weights = weights if dropout is None else weights * dropout
    out = jnp.einsum("...gtrs,...sgv->...gtrv", weights.astype(v.dtype), v, preferred_element_type=wide)
    return jnp.swapaxes(out / total[..., None], -4, -3), jnp.swapaxes(lse, -3, -2)


def unnormalised_softmax(scores: jax.Array, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the softmax over the last axis before its division: weights (..., s), the sums (...) that divide them,
    and log-sum-exps (...).

    A row of -inf has weights 0, sum 1 and log-sum-exp -inf.

    Args:
      scores: (..., s), -inf where a query sees no key.
      sinks: logits that broadcast to (...) and count in the sums, or None.
    """
    # The shift cancels, so no gradient need pass through it; it is finite also where a query sees no key.
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
