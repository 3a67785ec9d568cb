"""Landmark attention on scheduled tiles: the query's current block is masked attention, the previous ones are landmark
blocks, one tile each; the two are over disjoint keys, and merge by their log-sum-exps
(pallas_kernels/scheduled_attention). Gradients follow by themselves, as this module only rearranges arrays: blocks are
laid out with their unused slots 0.

In one document from its start all fields are known when the program is traced, and so are the tiles to visit. In other
self-attention it is still known that what is stored late is hidden: `StoredNear` bounds tiles by place of storage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.key_schedule import complete_blocks, slices
from recollect.pallas_kernels.masks import (
    EarlierBlock,
    IsOrdinary,
    Mask,
    SameBlock,
    SameSegment,
    StoredNear,
    causal,
)
from recollect.pallas_kernels.scheduled_attention import flash_vjp
from recollect.pallas_kernels.scheduled_attention.block_schedule import SEGMENTS, Fields
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.sharding import over_mesh

FEWEST_QUERIES = 8
"""Against a cache; fewer would have all of it laid out in blocks for a tile that is mostly padding, where xla reads
it in place."""


def on_kernels(kernels: flash_vjp.KernelModule) -> tuple[Callable[..., Any], Callable[..., str | None]]:
    """Returns the operation on a kernel module, and its `refuses`; both take the arguments that xla.py takes."""

    def attention(
        q, k, v, query_positions, key_positions, query_segments, key_segments, *, block, scale, self_attention
    ) -> tuple[jax.Array, jax.Array]:
        q = zero_padding(q, query_segments)
        k, v = (zero_padding(x, key_segments) for x in (k, v))
        call = _LandmarkCall(kernels, block, scale, self_attention)
        query, key = (
            _fields(x.shape[1], positions, segments, block)
            for x, positions, segments in ((q, query_positions, query_segments), (k, key_positions, key_segments))
        )
        parts = [call.current_block(q, k, v, query, key)]
        previous = call.previous_blocks(q, k, v, query, key)
        return merge(*parts, *([] if previous is None else [previous]))

    def refuses(q, k, v, *, block, self_attention, **rest) -> str | None:
        if not self_attention and q.shape[1] < FEWEST_QUERIES:
            return f"it takes at least {FEWEST_QUERIES} queries against other keys; got {q.shape[1]}"
        return kernels.refuses(q, k, v) or kernels.refuses(q, k, v, block=block)

    names = {"q": "b t h k", "k": "b s h k", "v": "b s h v"}
    fields = {"query_positions": "b t", "key_positions": "b s", "query_segments": "b t", "key_segments": "b s"}
    return over_mesh(attention, {**names, **fields}, ("b t h v", "b t h")), refuses


@dataclasses.dataclass(frozen=True)
class _LandmarkCall:
    kernels: flash_vjp.KernelModule
    block: int
    scale: float
    self_attention: bool

    def current_block(self, q, k, v, query: Fields, key: Fields) -> tuple[jax.Array, jax.Array]:
        """Returns attention to the query's current block."""
        mask = causal(segmented=SEGMENTS in query) & SameBlock() & IsOrdinary()
        if self.self_attention and not isinstance(query["positions"], np.ndarray):
            mask = mask & StoredNear(reach=self.block + 1)
        tiles = self.kernels.tile_sizes(q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, window=self.block + 1)
        return self._attend(q, k, v, mask, query, key, tiles, None)

    def previous_blocks(self, q, k, v, query: Fields, key: Fields) -> tuple[jax.Array, jax.Array] | None:
        """Returns attention to previous blocks; None if there can be none."""
        c = self.block + 1
        # In self-attention no query is left of a block that ends with the last token.
        s = k.shape[1] - 1 if self.self_attention else k.shape[1]
        if s < c:
            return None
        tiles = self.kernels.tile_sizes(q.shape[1], s, q.shape[3], v.shape[3], q.dtype, block=self.block)
        slots = tiles[1]
        if isinstance(key["positions"], np.ndarray) and SEGMENTS not in key:
            n = s // c
            laid_k, laid_v = (_laid_out(x[:, : n * c].reshape(x.shape[0], n, c, *x.shape[2:]), slots) for x in (k, v))
            of_blocks: dict[str, Any] = {"blocks": np.arange(n, dtype=np.int32)[None]}
            of_queries = {"blocks": query["blocks"]}
            mask: Mask = EarlierBlock()
        else:
            positions = jnp.broadcast_to(key["positions"], k.shape[:2])
            segments = jnp.broadcast_to(key.get(SEGMENTS, np.ones((1, 1), np.int32)), k.shape[:2])
            blocks = complete_blocks(positions, segments, self.block + 1)
            laid_k, laid_v = (_laid_out(slices(x, blocks.start, c), slots) for x in (k, v))
            of_blocks = {"blocks": blocks.number, SEGMENTS: blocks.segment}
            of_queries = {"blocks": query["blocks"], SEGMENTS: query.get(SEGMENTS, np.ones((1, q.shape[1]), np.int32))}
            mask = EarlierBlock() & SameSegment()
            if self.self_attention:
                mask = mask & StoredNear()
                # At most the place of the block's landmark.
                of_blocks["order"] = np.arange(blocks.start.shape[1], dtype=np.int32)[None] * c + 1
                of_queries["order"] = query["order"]
        repeated = {
            name: (np if isinstance(x, np.ndarray) else jnp).repeat(x, slots, axis=1) for name, x in of_blocks.items()
        }
        return self._attend(q, laid_k, laid_v, mask, of_queries, repeated, tiles, self.block)

    def _attend(self, q, k, v, mask, query, key, tiles, block):
        return flash_vjp.attend(
            self.kernels,
            q,
            k,
            v,
            mask=mask,
            query_fields=query,
            key_fields=key,
            scale=self.scale,
            query_tile=tiles[0],
            key_tile=tiles[1],
            block=block,
        )


def _fields(length: int, positions, segments, block: int) -> dict[str, Any]:
    """Returns all fields that masks may read of tokens: numpy where known at trace time."""
    order = np.arange(length, dtype=np.int32)[None]
    positions = order if positions is None else positions.astype(jnp.int32)
    c = block + 1
    fields: dict[str, Any] = {
        "positions": positions,
        "blocks": positions // c,
        "token_types": (positions % c == block).astype(np.int32),
        "order": order,
    }
    return fields if segments is None else {**fields, SEGMENTS: segments.astype(jnp.int32)}


def _laid_out(x: jax.Array, slots: int) -> jax.Array:
    """Returns blocks (b, n, c, g, d) in tiles of slots: (b, n slots, g, d)."""
    b, n, c, groups, dim = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - c), (0, 0), (0, 0))).reshape(b, n * slots, groups, dim)
