"""Landmark attention's grouped softmax (Mohtashami & Jaggi 2023, section 3.1).

A landmark token closes every block of `block` ordinary tokens; a stored block is block + 1 tokens. With s_ij = scale
q_i . k_j, and B the block of query i (a landmark belongs to the block it closes),

    w_ij = softmax over {ordinary j of block B, j <= i} and {landmarks of blocks b < B}                       (main group)
    w_ij = main(landmark of b) * softmax over the ordinary tokens of b                    for ordinary j of a block b < B
    o_i  = sum over ordinary j of w_ij v_j

Weights of a row sum to 1. No query sees the landmark of its own block, itself included, and no landmark's value is ever
read.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.all_gather_kv import over_gathered_keys
from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.landmark_attention.retrieval import retrieve_blocks
from recollect.pallas_kernels.sharding import sequence_parts


def landmark_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block: int,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Grouped-softmax attention.

    Positions count within a document with landmarks included: a token stands in block position // (block + 1), and is a
    landmark when position % (block + 1) == block. Keys of one document must be stored in order, without gaps.

    Self-attention is recognised when t == s and the key fields are left out (they are then the queries') or are the
    very arrays given
    for the queries: then keys stored after a query are taken to be hidden from it, which saves half of the work.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      block: ordinary tokens a block, at least 1.
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
    if q.ndim == k.ndim == 4 and q.shape[1] == k.shape[1]:
        key_positions = query_positions if key_positions is None else key_positions
        key_segments = query_segments if key_segments is None else key_segments
    fields = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_segments": query_segments,
        "key_segments": key_segments,
    }
    _check(q, k, v, block, fields)
    self_attention = q.shape[1] == k.shape[1] and query_positions is key_positions and query_segments is key_segments
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
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"landmark_attention: {name} must have four dimensions; got {array.shape}")
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    if t < 1 or s < 1:
        raise ValueError(f"landmark_attention: q and k must hold at least one token; got {q.shape}, {k.shape}")
    if k.shape[0] != b or k.shape[3] != dim:
        raise ValueError(f"landmark_attention: k must be ({b}, s, g, {dim}) to fit q {q.shape}; got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"landmark_attention: v must be {k.shape[:3]} + (v,); got {v.shape}")
    if groups < 1 or h % groups:
        raise ValueError(f"landmark_attention: q has {h} heads, which is no multiple of the {groups} heads of k")
    if block < 1:
        raise ValueError(f"landmark_attention: block must be at least 1; got {block}")
    for name, field in fields.items():
        shape = (b, t if name.startswith("query") else s)
        if field is not None and field.shape != shape:
            raise ValueError(f"landmark_attention: {name} must be {shape}; got {field.shape}")
        if field is not None and not jnp.issubdtype(field.dtype, jnp.integer):
            raise ValueError(f"landmark_attention: {name} must be integers; got {field.dtype}")
    if (fields["query_segments"] is None) != (fields["key_segments"] is None):
        raise ValueError("landmark_attention: query_segments and key_segments must be given together")


__all__ = ["BACKENDS", "landmark_attention", "retrieve_blocks"]
