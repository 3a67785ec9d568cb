"""Landmark attention's grouped softmax (Mohtashami & Jaggi 2023, section 3.1).

A landmark token closes every block of `block` ordinary tokens; a stored block is block + 1 tokens. With s_ij = scale
q_i . k_j, and B the block of query i (a landmark belongs to the block it closes),

    w_ij = softmax over {ordinary j of block B, j <= i} and {landmarks of blocks b < B}                       (main
      group)
    w_ij = main(landmark of b) * softmax over the ordinary tokens of b                    for ordinary j of a block b <
      B
    o_i  = sum over ordinary j of w_ij v_j

Weights of a row sum to 1. No query sees the landmark of its own block, itself included, and no landmark's value is ever
read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.all_gather_kv import over_gathered_keys
from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.landmark_attention.retrieval import landmark_schedule, retrieve_blocks
from recollect.pallas_kernels.segments import KnownArray
from recollect.pallas_kernels.softmax_attention import (
    check_attention,
    is_self_attention,
    with_key_fields,
)


def landmark_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    block: int,
    query_positions: Int[KnownArray, "b t"] | None = None,
    key_positions: Int[KnownArray, "b s"] | None = None,
    query_segments: Int[KnownArray, "b t"] | None = None,
    key_segments: Int[KnownArray, "b s"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Computes grouped-softmax attention.

    Positions count within a document with landmarks included: a token stands in block position // (block + 1), and is a
    landmark when position % (block + 1) == block. Keys of one document must be stored in order, without gaps.

    Self-attention is recognised when t == s and the key fields are left out (they are then the queries') or are the
    very arrays given for the queries: then keys stored after a query are taken to be hidden from it, which saves half
    of the work.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      block: ordinary tokens per block, at least 1.
      query_positions, key_positions: (b, t) and (b, s) int; None counts from 0.
      query_segments, key_segments: (b, t) and (b, s) int, 0 is padding, which may hold NaN; None is one document.
      scale: of the scores; None is k^(-1/2).
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      (b, t, h, v) in q's dtype, zeros for padded queries; with `return_lse` also the logarithm of the main group's
      softmax denominator, (b, t, h) fp32 (wider for wider inputs), -inf for padded queries.

    Raises:
      ValueError: an argument's shape or value does not fit, or the backend cannot serve the call.
    """
    fields = with_key_fields(
        q,
        k,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
    )
    _check(q, k, v, block, fields)
    self_attention = is_self_attention(q, k, fields)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if self_attention and sequence_parts(q.shape[1]) > 1:
        part = functools.partial(landmark_attention, block=block, scale=scale, return_lse=return_lse, backend=backend)
        return over_gathered_keys(
            part, q, k, v, positions=query_positions, segments=query_segments, return_lse=return_lse
        )
    arguments = {**fields, "block": block, "scale": scale, "self_attention": self_attention}
    out, lse = choose("landmark_attention", backend, BACKENDS, q, k, v, **arguments)(q, k, v, **arguments)
    return (out, lse) if return_lse else out


BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.landmark_attention.gpu",
    "pallas_tpu": "recollect.pallas_kernels.landmark_attention.tpu",
    "xla": "recollect.pallas_kernels.landmark_attention.xla",
    "reference": "recollect.pallas_kernels.landmark_attention.reference",
}


def _check(q, k, v, block, fields) -> None:
    check_attention("landmark_attention", q, k, v, fields)
    if q.shape[1] < 1 or k.shape[1] < 1:
        raise ValueError(f"landmark_attention: q and k must hold at least one token; got {q.shape}, {k.shape}")
    if block < 1:
        raise ValueError(f"landmark_attention: block must be at least 1; got {block}")
    for name, field in fields.items():
        if field is not None and not jnp.issubdtype(field.dtype, jnp.integer):
            raise ValueError(f"landmark_attention: {name} must be integers; got {field.dtype}")


__all__ = ["BACKENDS", "landmark_attention", "landmark_schedule", "retrieve_blocks"]
