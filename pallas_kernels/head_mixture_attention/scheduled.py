"""Head-mixture attention on scheduled tiles (recollect.pallas_kernels.scheduled_attention): each tile of the head_tiles has
one key head, and its block schedule, made on the device from its rows' positions and documents, leaves out keys that
come after its last row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.head_mixture_attention.head_groups import group_by_head, tile_count
from recollect.pallas_kernels.masks import causal
from recollect.pallas_kernels.scheduled_attention import flash_vjp
from recollect.pallas_kernels.sharding import over_mesh

FEWEST_QUERIES = 8
LARGEST_TILE = 256
"""Rows: half a tile a head is filler."""


def on_kernels(kernels: flash_vjp.KernelModule) -> tuple[Callable[..., Any], Callable[..., str | None]]:
    """Returns the operation on a kernel module, and its `refuses`; both take the arguments that xla.py takes."""

    def on_device(
        q, k, v, chosen, query_positions, key_positions, query_segments, key_segments, *, active, key_heads, scale
    ) -> tuple[jax.Array, jax.Array]:
        (b, t, h, _), s = q.shape, k.shape[1]
        active = min(active, h)  # on a mesh a device has a part of the heads
        own = [head * k.shape[2] // h for head in range(h)] if key_heads is None else key_heads
        query_tile, key_tile = _tiles(kernels, q, k, v, active)
        head_tiles = group_by_head(chosen, active, query_tile)
        positions = (
            jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)) if query_positions is None else query_positions
        )
        segments = jnp.ones((b, t), jnp.int32) if query_segments is None else query_segments
        out, lse = flash_vjp.attend(
            kernels,
            head_tiles.gather(q)[:, :, None],
            k,
            v,
            mask=causal(segmented=query_segments is not None),
            query_fields={
                "positions": _rows(head_tiles.field(positions)),
                "segments": _rows(head_tiles.field(segments)),
            },
            key_fields={
                "positions": np.arange(s, dtype=np.int32)[None] if key_positions is None else key_positions,
                "segments": np.ones((1, s), np.int32) if key_segments is None else key_segments,
            },
            scale=scale,
            query_tile=query_tile,
            key_tile=key_tile,
            key_heads=jnp.asarray(own, jnp.int32)[head_tiles.heads],
        )
        return head_tiles.combine(out[:, :, 0]), jnp.where(chosen, head_tiles.combine(lse)[..., 0], -jnp.inf)

    regular = over_mesh(on_device, _letters("h"), ("b t h v", "b t h"))
    irregular = over_mesh(on_device, _letters("r"), ("b t r v", "b t r"))

    def attention(
        q, k, v, chosen, *, active, key_heads, query_positions, key_positions, query_segments, key_segments, scale
    ):
        plain = (
            key_heads == tuple(head * k.shape[2] // q.shape[2] for head in range(q.shape[2]))
            and q.shape[2] % k.shape[2] == 0
        )
        run = regular if plain else irregular
        fields = (query_positions, key_positions, query_segments, key_segments)
        return run(q, k, v, chosen, *fields, active=active, key_heads=None if plain else key_heads, scale=scale)

    def refuses(q, k, v, chosen, *, active, **rest) -> str | None:
        t, h = q.shape[1:3]
        if t < FEWEST_QUERIES:
            return f"it takes at least {FEWEST_QUERIES} queries; got {t}"
        tile = _tiles(kernels, q, k, v, active)[0]
        rows = tile_count(t, h, active, tile) * tile
        return kernels.refuses(jax.ShapeDtypeStruct((q.shape[0], rows, 1, q.shape[3]), q.dtype), k, v, gathered=True)

    return attention, refuses


def _letters(heads: str) -> dict[str, str]:
    letters = {"q": f"b t {heads} k", "k": f"b s {heads} k", "v": f"b s {heads} v", "chosen": f"b t {heads}"}
    return letters | {"query_positions": "b t", "key_positions": "b s", "query_segments": "b t", "key_segments": "b s"}


def _tiles(kernels: flash_vjp.KernelModule, q: Any, k: Any, v: Any, active: int) -> tuple[int, int]:
    """Rows and keys a tile: a kernel's own choice for a head's share of the queries."""
    t, h = q.shape[1:3]
    query_tile, key_tile = kernels.tile_sizes(max(1, t * active // h), k.shape[1], q.shape[3], v.shape[3], q.dtype)
    return min(query_tile, LARGEST_TILE), key_tile


def _rows(field: jax.Array) -> jax.Array:
    """(b, n, tile) to (b, n * tile)."""
    return field.reshape(field.shape[0], -1)
