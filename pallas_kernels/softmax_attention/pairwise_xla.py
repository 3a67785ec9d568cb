"""Scores with a bias, and weights with dropout, for XLA: blocks of queries against the keys stored up to their end,
where keys are the queries' tokens and hidden if stored later; else all keys. Each takes the memory of the scores."""

from __future__ import annotations

import jax.numpy as jnp

from recollect.pallas_kernels.scheduled_attention.block_schedule import pairs_allowed
from recollect.pallas_kernels.softmax_attention import is_expression, is_self_attention
from recollect.pallas_kernels.softmax_attention.scheduled import mask_and_fields
from recollect.pallas_kernels.softmax_attention.xla import MOST_BLOCKS, QUERY_BLOCK, attend


def pairwise(q, k, v, bias, dropout, sinks, scale, *, window, mask, **fields):
    """Returns output and log-sum-exp of grouped queries (b, t, g, r, k); bias and dropout (b or 1, h or 1, t, s) or
    None."""
    t, groups, rows = q.shape[1:4]

    def grouped(x):
        """(b, h, t, s) to the layout of scores, (b, g, t, r, s)."""
        heads = (groups, rows) if x.shape[1] > 1 else (1, 1)
        return jnp.swapaxes(x.reshape(x.shape[0], *heads, *x.shape[2:]), 2, 3)

    bias, dropout = (None if x is None else grouped(x) for x in (bias, dropout))
    size = t
    if mask is None and is_self_attention(q, k, fields):
        size = max(QUERY_BLOCK, -(-t // MOST_BLOCKS))
    if mask is None or is_expression(mask):
        mask = pairs_allowed(*mask_and_fields(q, k, window=window, mask=mask, **fields))
    elif fields["query_segments"] is not None:
        mask = mask & (fields["query_segments"] != 0)[:, :, None]
    parts = []
    for start in range(0, t, size):
        end = min(start + size, t)
        last = end if size < t else k.shape[1]
        pairs = (None if x is None else x[:, :, start:end, :, :last] for x in (bias, dropout))
        seen = mask[:, start:end, :last]
        parts.append(attend(q[:, start:end], k[:, :last], v[:, :last], seen, scale, sinks, *pairs))
    return tuple(jnp.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True))
