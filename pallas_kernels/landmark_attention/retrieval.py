"""Landmark attention with retrieval: each query and head reads its own block and the top k of the earlier ones, by
landmark score.

Which blocks are read is defined a query, so it does not depend on how a prompt was split. Keys come unrotated, because
a block's position depends on the query (stingy positions; Mohtashami & Jaggi 2023, section 3.2): with c = block + 1 and
B earlier blocks,

- the query and its own block stand in slot min(B, k + 1), so no position beyond (k + 2) c is ever used;
- for ranking, the newest k blocks stand where they are relative to the query, all older ones in slot 0;
- the chosen blocks, oldest first, stand in slots 0 .. k - 1, one slot later if they are among the newest k.

With B <= k all blocks are read at their true positions: the grouped softmax of training.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from recollect.pallas_kernels.dispatch import choose

Rotate = Callable[[jax.Array, jax.Array], jax.Array]
"""Turns x (..., t, h, k) by positions (..., t)."""

RETRIEVAL_BACKENDS = {"xla": "recollect.pallas_kernels.landmark_attention.retrieval_xla"}


def retrieve_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block: int,
    top: int,
    rotate: Rotate,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | None = None,
    query_chunk: int = 16,
    backend: str | None = None,
) -> jax.Array:
    """Grouped softmax over the query's block and its `top` best earlier blocks. Of the keys it reads landmarks, the
    chosen blocks and the query's own.

    Args:
      q: (b, t, h, k) and k (b, s, g, k), both unrotated; v (b, s, g, v). h a multiple of g.
      top: blocks read beside the own one.
      query_positions, query_segments: (b, t); key_positions, key_segments: (b, s); as in landmark_attention.
      query_chunk: queries worked on at once (memory grows with it).
      backend: see recollect.pallas_kernels.dispatch; there is an xla form.

    Returns:
      (b, t, h, v) in q's dtype; zeros for padded queries.

    Raises:
      ValueError: top or query_chunk below 1, or a backend that it lacks.
    """
    for name, size in (("top", top), ("query_chunk", query_chunk)):
        if size < 1:
            raise ValueError(f"retrieve_blocks: {name} must be at least 1; got {size}")
    run = choose("landmark_retrieval", backend, RETRIEVAL_BACKENDS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = (query_positions, query_segments), (key_positions, key_segments)
    return run(q, k, v, queries, keys, block=block, top=top, rotate=rotate, scale=scale, query_chunk=query_chunk)
