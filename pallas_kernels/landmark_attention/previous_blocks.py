"""Attention to previous landmark blocks as super-tokens, in plain jnp. With P_b the share of block b's landmark among
the landmarks a query sees, and n_j the softmax over the ordinary tokens of a block alone,

    o = sum_b P_b sum_j n_j v_j,     D_b = sum_j n_j g . v_j,     ds_j = P_b n_j (g . v_j - D_b),     ds_landmark = P_b
      (D_b - delta)

with g the cotangent of o and delta = g . o - dlse (the derivation of pallas_kernels/scheduled_attention/flash_vjp.py).
Scores are recomputed for the gradient.

In self-attention a query sees blocks stored before it only: parts of queries meet as many blocks as may lie before
their end. A part longer than `QUERIES` is scanned, so that memory grows with the length and not with its square.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import in_parts, in_parts_with_sums
from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax

QUERIES = 256
"""Queries whose scores are held at once."""

SMALLEST_PART = 128
MOST_PARTS = 16
"""Parts are unrolled in the program: longer sequences get longer ones."""

MASKED = 1e30
"""In place of the log-sum-exp of a query that sees no block: exp(s - 1e30) is 0."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def previous_blocks(
    block: int, scale: float, first: int | None, q, k, v, query_blocks, segments, numbers, block_segments
) -> tuple[jax.Array, jax.Array]:
    """Returns attention to blocks before the query's, of its document.

    Args:
      first: in self-attention, that the landmark of block m of `k` is stored at m (block + 1) + first or later, and so
        hidden from queries stored before; None elsewhere.
      q: (b, t, g, r, k). k: (b, n, block + 1, g, k) and v (b, n, block + 1, g, v), complete blocks.
      query_blocks, numbers: (b or 1, t) and (b or 1, n), numbers of blocks in their documents.
      segments, block_segments: (b, t) and (b, n), 0 for padding and where there is no block; None for one document.

    Returns:
      o (b, t, g, r, v) and lse (b, t, g, r), fp32 or wider; 0 and -inf where no block is seen.
    """
    return _forward(block, scale, first, q, k, v, query_blocks, segments, numbers, block_segments)[0]


def _forward(block, scale, first, q, k, v, query_blocks, segments, numbers, block_segments):
    outs = []
    for rows, count in _parts(q.shape[1], k.shape[1], k.shape[2], first):
        part_q, part_blocks, part_segments = (None if x is None else x[:, rows] for x in (q, query_blocks, segments))
        part_k, part_v, *blocks = (None if x is None else x[:, :count] for x in (k, v, numbers, block_segments))

        def some(part, k=part_k, v=part_v, blocks=blocks):
            q, query_blocks, segments = part
            return _rows(block, scale, q, k, v, _allowed(query_blocks, segments, *blocks))

        outs.append(in_parts(some, (part_q, part_blocks, part_segments), QUERIES))
    o, lse = (jnp.concatenate(x, axis=1) for x in zip(*outs, strict=True))
    return (o, lse), (q, k, v, query_blocks, segments, numbers, block_segments, o, lse)


def _backward(block, scale, first, kept, cotangents):
    q, k, v, query_blocks, segments, numbers, block_segments, o, lse = kept
    do, d_lse = cotangents
    some = jnp.isfinite(lse)
    delta = jnp.sum(do * o, axis=-1) - jnp.where(some, d_lse, 0)
    lse = jnp.where(some, lse, MASKED)
    dqs, dk, dv = [], jnp.zeros(k.shape, o.dtype), jnp.zeros(v.shape, o.dtype)
    for rows, count in _parts(q.shape[1], k.shape[1], k.shape[2], first):
        part = tuple(None if x is None else x[:, rows] for x in (q, query_blocks, segments, do, delta, lse))
        part_k, part_v, *blocks = (None if x is None else x[:, :count] for x in (k, v, numbers, block_segments))

        def step(sums, part, k=part_k, v=part_v, blocks=blocks):
            q, query_blocks, segments, do, delta, lse = part
            dq, dk, dv = _row_gradients(
                block, scale, q, k, v, _allowed(query_blocks, segments, *blocks), do, delta, lse
            )
            return (sums[0] + dk, sums[1] + dv), dq

        sums = (jnp.zeros(k[:, :count].shape, o.dtype), jnp.zeros(v[:, :count].shape, o.dtype))
        # What fills the last part is of segment 0, or of block 0, which sees nothing.
        (more_k, more_v), dq = in_parts_with_sums(step, sums, part, QUERIES)
        dqs.append(dq)
        dk, dv = dk.at[:, :count].add(more_k), dv.at[:, :count].add(more_v)
    return jnp.concatenate(dqs, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None


previous_blocks.defvjp(_forward, _backward)


def _parts(t: int, n: int, c: int, first: int | None) -> list[tuple[slice, int]]:
    """Returns slices of queries, and how many blocks each may see: at least one, as empty arrays need care."""
    if first is None:
        return [(slice(0, t), n)]
    size = max(SMALLEST_PART, -(-t // MOST_PARTS))
    ends = [(start, min(start + size, t)) for start in range(0, t, size)]
    return [(slice(start, end), max(1, min(n, -(-(end - 1 - first) // c)))) for start, end in ends]


def _allowed(query_blocks, segments, numbers, block_segments) -> jax.Array:
    """Returns the pairs of queries and blocks that are visible, (b or 1, t, n) bool."""
    allowed = numbers[:, None, :] < query_blocks[:, :, None]
    if segments is not None:
        allowed &= (segments[:, :, None] == block_segments[:, None, :]) & (segments != 0)[:, :, None]
    return allowed


def _scores(block, scale, q, k):
    """Returns landmarks' scores (b, g, t, r, n), and for ordinary tokens (b, g, t, r, n, c) exp(s - greatest) and its
    sum; 0 for the landmark."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btgrk,bncgk->bgtrnc", q, k, preferred_element_type=wide) * scale
    ordinary = jnp.arange(block + 1) < block
    inner = jnp.where(ordinary, scores, -jnp.inf)
    weights = jnp.exp(inner - jnp.max(inner, axis=-1, keepdims=True))
    return scores[..., block], weights, jnp.sum(weights, axis=-1)


def _rows(block, scale, q, k, v, allowed):
    gates, weights, sums = _scores(block, scale, q, k)
    shares, total, lse = unnormalised_softmax(jnp.where(allowed[:, None, :, None], gates, -jnp.inf))
    weights = weights * (shares / (sums * total[..., None]))[..., None]
    o = jnp.einsum("bgtrnc,bncgv->bgtrv", weights.astype(v.dtype), v, preferred_element_type=gates.dtype)
    return jnp.swapaxes(o, 1, 2), jnp.swapaxes(lse, 1, 2)


def _row_gradients(block, scale, q, k, v, allowed, do, delta, lse):
    gates, weights, sums = _scores(block, scale, q, k)
    wide = gates.dtype
    delta, lse = (jnp.swapaxes(x, 1, 2)[..., None] for x in (delta, lse))
    shares = jnp.where(allowed[:, None, :, None], jnp.exp(jnp.where(allowed[:, None, :, None], gates - lse, 0)), 0)
    weights = weights / sums[..., None]
    dots = jnp.einsum("btgrv,bncgv->bgtrnc", do.astype(v.dtype), v, preferred_element_type=wide)
    averages = jnp.sum(weights * dots, axis=-1, keepdims=True)
    shares = shares[..., None]
    is_landmark = jnp.arange(block + 1) == block
    ds = scale * shares * jnp.where(is_landmark, averages - delta[..., None], weights * (dots - averages))
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("bgtrnc,bncgk->btgrk", ds, k, preferred_element_type=wide)
    dk = jnp.einsum("bgtrnc,btgrk->bncgk", ds, q, preferred_element_type=wide)
    dv = jnp.einsum(
        "bgtrnc,btgrv->bncgv", (shares * weights).astype(v.dtype), do.astype(v.dtype), preferred_element_type=wide
    )
    return dq, dk, dv
