"""Landmark attention with retrieval: each query and head reads the blocks of its window up to it, and the top k of
those before the window, by landmark score.

A window is `window` blocks of a document; the published code reads a chunk of several blocks whole and retrieves what
stands before it, and a window of one block (here the default) is the query's own. Which blocks are read is defined per
query, so it does not depend on how a prompt was split. Keys come unrotated, because a block's position depends on the
query (stingy positions; Mohtashami & Jaggi 2023, section 3.2): with c = block + 1 and B blocks before the window,

- the window begins in slot min(B, k + 1), so no position beyond (k + 1 + window) c is ever used;
- for ranking, the newest k blocks stand where they are relative to the query, all older ones in slot 0;
- the chosen blocks, oldest first, stand in slots 0 .. k - 1, one slot later if they are among the newest k.

With B <= k all blocks are read at their true positions: the grouped softmax of training. Among equal scores the older
block is taken: in the first layer, where a model's landmark tokens are all one vector, landmarks of the older blocks
have equal keys, and the same position.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.chunking import in_parts
from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.key_schedule import KeySchedule, best_blocks, complete_blocks, earlier_blocks
from recollect.pallas_kernels.segments import zero_padding

Rotate = Callable[[jax.Array, jax.Array], jax.Array]
"""Rotates x (..., t, h, k) by positions (..., t)."""

RETRIEVAL_BACKENDS = {"xla": "recollect.pallas_kernels.landmark_attention.retrieval_xla"}


def landmark_schedule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    *,
    block: int,
    top: int,
    rotate: Rotate,
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    query_segments: Int[Array, "b t"],
    key_segments: Int[Array, "b s"],
    window: int = 1,
    query_chunk: int = 16,
) -> KeySchedule:
    """Returns the `top` best blocks before each query's window, per head; arguments are those of `retrieve_blocks`.

    Raises:
      ValueError: block, top, window or query_chunk below 1.
    """
    for name, size in (("block", block), ("top", top), ("window", window), ("query_chunk", query_chunk)):
        if size < 1:
            raise ValueError(f"landmark_schedule: {name} must be at least 1; got {size}")
    c = block + 1
    blocks = complete_blocks(key_positions, key_segments, c)
    landmarks = jnp.take_along_axis(k, jnp.minimum(blocks.start + block, k.shape[1] - 1)[:, :, None, None], axis=1)
    landmarks = jnp.where(blocks.exists[:, :, None, None], landmarks, 0)
    rotated = (rotate(landmarks, blocks.number * c + block), rotate(landmarks, jnp.full_like(blocks.number, block)))
    top = min(top, blocks.start.shape[1])

    def some(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, positions, segments = part
        before = positions // c // window * window
        grouped = (*q.shape[:2], k.shape[2], -1, q.shape[3])
        wide = jnp.promote_types(q.dtype, jnp.float32)
        score_true, score_old = (
            jnp.einsum("btgrk,bngk->btgrn", rotate(q, at).reshape(grouped), keys, preferred_element_type=wide)
            for at, keys in zip((positions, stingy_positions(positions, c, top, window)), rotated, strict=True)
        )
        recent = before[:, :, None] - blocks.number[:, None, :] <= top
        score = jnp.where(recent[:, :, None, None, :], score_true, score_old).reshape(*q.shape[:3], -1)
        return best_blocks(score, earlier_blocks(blocks, before, segments)[:, :, None], top)

    q = zero_padding(q, query_segments)
    index, valid = in_parts(some, (q, query_positions, query_segments), query_chunk)
    return KeySchedule(blocks, index, valid, c)


def stingy_positions(positions: Int[Array, "b t"], c: int, top: int, window: int) -> Int[Array, "b t"]:
    """Returns where queries stand whose window begins in slot min(B, top + 1), of slots of c tokens."""
    before = positions // c // window * window
    return positions - before * c + jnp.minimum(before, top + 1) * c


def retrieve_blocks(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    schedule: KeySchedule,
    *,
    rotate: Rotate,
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    query_segments: Int[Array, "b t"],
    key_segments: Int[Array, "b s"],
    window: int = 1,
    scale: float | None = None,
    query_chunk: int = 16,
    backend: str | None = None,
) -> Float[Array, "b t h v"]:
    """Computes the grouped softmax over the blocks of the query's window and those of a schedule. Of the keys it reads
    the scheduled blocks and the window's.

    Args:
      q: (b, t, h, k) and k (b, s, g, k), both unrotated; v (b, s, g, v). h a multiple of g.
      schedule: of `landmark_schedule`, with the same window.
      query_positions, query_segments: (b, t); key_positions, key_segments: (b, s); as in landmark_attention.
      window: blocks of a window.
      query_chunk: queries worked on at once (memory grows with it).
      backend: see recollect.pallas_kernels.dispatch; there is only xla.

    Returns:
      (b, t, h, v) in q's dtype; zeros for padded queries.

    Raises:
      ValueError: query_chunk below 1, or a backend that it lacks.
    """
    if query_chunk < 1:
        raise ValueError(f"retrieve_blocks: query_chunk must be at least 1; got {query_chunk}")
    run = choose("landmark_retrieval", backend, RETRIEVAL_BACKENDS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = (query_positions, query_segments), (key_positions, key_segments)
    return run(q, k, v, schedule, queries, keys, window=window, rotate=rotate, scale=scale, query_chunk=query_chunk)
