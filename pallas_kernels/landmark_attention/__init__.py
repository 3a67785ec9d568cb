"""Landmark attention's grouped softmax (Mohtashami & Jaggi 2023, section 3.1).

A landmark token closes every block of `block` ordinary tokens; a stored block is block + 1 tokens. With s_ij = scale q_i . k_j, and B
the block of query i (a landmark belongs to the block it closes),

    w_ij = softmax over {ordinary j of block B, j <= i} and {landmarks of blocks b < B}                       (main group)
    w_ij = main(landmark of b) * softmax over the ordinary tokens of b                    for ordinary j of a block b < B
    o_i  = sum over ordinary j of w_ij v_j

Weights of a row sum to 1. No query sees the landmark of its own block, itself included, and no landmark's value is ever read.
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import always, choose
from pallas_kernels.landmark_attention import reference, xla
from pallas_kernels.landmark_attention.retrieval import retrieve_blocks


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
    backend: str | None = None,
) -> jax.Array:
    """Grouped-softmax attention.

    Positions count within a document with landmarks included: a token stands in block position // (block + 1), and is a landmark
    when position % (block + 1) == block. Keys of one document must be stored in order, without gaps.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      query_positions, key_positions: (b, t) and (b, s); None counts from 0.
      query_segments, key_segments: (b, t) and (b, s), 0 is padding; None is one document.
      scale: of the scores; None is k^(-1/2).

    Returns:
      (b, t, h, v) in q's dtype; zeros for padded queries.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    _check(q, k, v, block, query_positions, key_positions, query_segments, key_segments)
    run = choose("landmark_attention", backend, {"xla": (xla.blocked, always), "reference": (reference.dense, always)})
    return run(
        q,
        k,
        v,
        block=block,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _check(q, k, v, block, query_positions, key_positions, query_segments, key_segments) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"landmark_attention: q, k, v must have four dimensions; got {q.shape}, {k.shape}, {v.shape}")
    b, t, h, dim = q.shape
    if k.shape[0] != b or k.shape[3] != dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"landmark_attention: k and v do not fit q {q.shape}: {k.shape}, {v.shape}")
    if h % k.shape[2]:
        raise ValueError(f"landmark_attention: {h} query heads are no multiple of {k.shape[2]} key heads")
    if block < 1:
        raise ValueError(f"landmark_attention: block must be at least 1; got {block}")
    for name, field, length in (
        ("query_positions", query_positions, t),
        ("key_positions", key_positions, k.shape[1]),
        ("query_segments", query_segments, t),
        ("key_segments", key_segments, k.shape[1]),
    ):
        if field is not None and field.shape != (b, length):
            raise ValueError(f"landmark_attention: {name} must be {(b, length)}; got {field.shape}")


__all__ = ["landmark_attention", "retrieve_blocks"]
