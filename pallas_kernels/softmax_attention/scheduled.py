"""Softmax attention on scheduled tiles: turns a call of the public function into the mask and fields that
recollect.pallas_kernels.scheduled_attention takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.masks import Mask, causal
from recollect.pallas_kernels.scheduled_attention import flash_vjp
from recollect.pallas_kernels.scheduled_attention.block_schedule import SEGMENTS, Fields, needed
from recollect.pallas_kernels.segments import zero_padding
from recollect.pallas_kernels.sharding import over_mesh
from recollect.pallas_kernels.softmax_attention import is_expression
from recollect.pallas_kernels.tuning import Sizes, block_sizes

FEWEST_QUERIES = 8
"""With fewer a tile would be mostly padding: xla's products read the cache once as well."""


def mask_and_fields(
    q, k, *, window, mask, query_positions, key_positions, query_segments, key_segments, query_fields, key_fields
) -> tuple[Mask, Fields, Fields]:
    """Returns the mask expression of a call whose mask is no array, and the fields that it reads of queries and of
    keys."""
    t, s = q.shape[1], k.shape[1]
    ordered = t == s and query_positions is key_positions and query_segments is key_segments
    if mask is None:
        mask = causal(window, segmented=query_segments is not None, ordered=ordered and query_positions is not None)
    sides = []
    for length, positions, segments, more in (
        (t, query_positions, query_segments, query_fields),
        (s, key_positions, key_segments, key_fields),
    ):
        fields = dict(more or {})
        fields["positions"] = np.arange(length, dtype=np.int32)[None] if positions is None else positions
        fields["order"] = np.arange(length, dtype=np.int32)[None]
        if segments is not None:
            fields[SEGMENTS] = segments
        sides.append(needed(mask, fields))
    return mask, sides[0], sides[1]


def default_tiles(kernels: flash_vjp.KernelModule) -> Callable[..., Sizes]:
    """Returns a module's resident tiles, as `tuning.block_sizes` asks for them; window 0 is none."""

    def heuristic(t: int, s: int, k: int, v: int, dtype: str, window: int) -> Sizes:
        query_tile, key_tile = kernels.tile_sizes(t, s, k, v, jnp.dtype(dtype), window=window or None)
        return {"query_tile": query_tile, "key_tile": key_tile}

    return heuristic


def on_kernels(kernels: flash_vjp.KernelModule, name: str) -> tuple[Callable[..., Any], Callable[..., str | None]]:
    """Returns the operation on a kernel module, and its `refuses`; arguments as the public function's. name: of its
    tiles in the tuning tables."""

    def attention(q, k, v, *, sinks, bias, dropout, scale, return_lse, deterministic, **rest):
        mask, query_fields, key_fields = mask_and_fields(q, k, **rest)
        q = zero_padding(q, rest["query_segments"])
        k, v = (zero_padding(x, rest["key_segments"]) for x in (k, v))
        sizes = block_sizes(
            name,
            default_tiles(kernels),
            t=q.shape[1],
            s=k.shape[1],
            k=q.shape[3],
            v=v.shape[3],
            dtype=str(q.dtype),
            window=min(rest["window"] or 0, k.shape[1]),
        )
        tiles = (sizes["query_tile"], sizes["key_tile"])
        known, traced = zip(*(_split(fields) for fields in (query_fields, key_fields)), strict=True)
        run = functools.partial(
            _on_device,
            kernels=kernels,
            known=known,
            names=tuple(tuple(x) for x in traced),
            mask=mask,
            scale=scale,
            tiles=tiles,
        )
        wrapped = over_mesh(
            lambda q, k, v, sinks, query_fields, key_fields: run(q, k, v, sinks, query_fields, key_fields),
            {
                "q": "b t h k",
                "k": "b s h k",
                "v": "b s h v",
                "sinks": "h",
                "query_fields": "b f t",
                "key_fields": "b f s",
            },
            ("b t h v", "b t h"),
        )
        out, lse = wrapped(q, k, v, sinks, *(_stacked(fields) for fields in traced))
        if sinks is not None and rest["query_segments"] is not None:
            lse = jnp.where((rest["query_segments"] != 0)[:, :, None], lse, -jnp.inf)
        return out, lse

    def refuses(q, k, v, *, mask, window, bias, dropout, **rest) -> str | None:
        if bias is not None:
            return "it takes no bias of scores"
        if dropout is not None:
            return "it takes no dropout of weights"
        if mask is not None and not is_expression(mask):
            return "it takes masks as expressions over token fields (pallas_kernels/masks.py), not as arrays"
        if q.shape[1] < FEWEST_QUERIES:
            return f"it takes at least {FEWEST_QUERIES} queries; got {q.shape[1]}"
        return kernels.refuses(q, k, v, window=window)

    return attention, refuses


def _split(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields known at trace time, and the others."""
    known = {name: x for name, x in fields.items() if isinstance(x, np.ndarray)}
    return known, {name: x for name, x in fields.items() if name not in known}


def _stacked(fields: dict[str, jax.Array]) -> jax.Array | None:
    """Returns the fields as one array (b, fields, tokens) int32, so that a mesh splits them all alike."""
    if not fields:
        return None
    rows = max(x.shape[0] for x in fields.values())
    return jnp.stack([jnp.broadcast_to(x.astype(jnp.int32), (rows, x.shape[1])) for x in fields.values()], axis=1)


def _on_device(q, k, v, sinks, query_fields, key_fields, *, kernels, known, names, mask, scale, tiles):
    stacks = (query_fields, key_fields)
    fields = [
        {**static, **{name: stack[:, index] for index, name in enumerate(traced)}}
        for static, traced, stack in zip(known, names, stacks, strict=True)
    ]
    return flash_vjp.attend(
        kernels,
        q,
        k,
        v,
        mask=mask,
        query_fields=fields[0],
        key_fields=fields[1],
        scale=scale,
        query_tile=tiles[0],
        key_tile=tiles[1],
        sinks=sinks,
    )
