"""Scheduled attention on TPUs at the shapes that experiments train: windows, gathered queries, landmark blocks;
forward, and with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.masks import EarlierBlock, IsOrdinary, SameBlock, SameSegment, causal
from recollect.pallas_kernels.scheduled_attention import flash_vjp, tpu
from tests.pallas_kernels.programs import Program

# b, t, query heads, key heads, key dimensions, value dimensions, window, dtype, what there is besides
WINDOWS = [
    (64, 64, 1, 1, 64, 64, None, "float32", ""),
    (64, 256, 1, 1, 64, 64, None, "float32", "documents"),
    (16, 256, 2, 2, 16, 16, 64, "float32", "sinks"),
    (4, 2048, 2, 2, 32, 32, 64, "bfloat16", ""),
    (2, 2048, 16, 16, 64, 64, None, "bfloat16", ""),
    (2, 2048, 16, 4, 64, 64, None, "bfloat16", "documents"),
    (2, 4096, 16, 4, 128, 128, 512, "bfloat16", "documents, sinks"),
    (1, 4096, 2, 2, 128, 128, None, "bfloat16", "documents"),
    (1, 16384, 16, 16, 64, 64, 512, "bfloat16", "sinks"),
    (2, 1000, 3, 1, 60, 40, 100, "float32", "documents, sinks"),
    (1, 512, 2, 1, 256, 256, None, "float32", "documents"),
    (1, 2048, 2, 1, 256, 256, None, "bfloat16", "documents"),
]
# b, queries of all heads, keys, heads of keys, dimensions, dtype
GATHERED = [
    (4, 512, 128, 2, 64, "bfloat16"),
    (8, 1024, 256, 4, 64, "float32"),
    (2, 8 * 2048 + 16 * 256, 2048, 16, 64, "bfloat16"),
    (1, 2 * 4096, 4096, 2, 128, "bfloat16"),
]
# b, t, query heads, key heads, dimensions, ordinary keys a block, dtype, what there is besides
LANDMARKS = [
    (4, 128, 2, 2, 32, 8, "bfloat16", "documents"),
    (8, 256, 2, 2, 32, 8, "float32", "documents"),
    (2, 2048, 8, 8, 64, 50, "bfloat16", "documents"),
    (2, 2048, 16, 4, 128, 63, "bfloat16", ""),
    (1, 2048, 2, 2, 64, 128, "bfloat16", "documents"),
    (1, 1024, 1, 1, 256, 255, "float32", "documents"),
]
QUICK = {WINDOWS[2], GATHERED[0], LANDMARKS[0]}


def abstract(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def both(
    what: str, shape: tuple[Any, ...], forward: Callable[..., Any], arrays: list[Any], fixed: list[Any]
) -> list[Program]:
    """forward(*arrays, *fixed) alone, and with its gradient by arrays. Of the quick shapes the gradient is quick, as
    it holds the forward pass."""

    def gradient(cotangent, *given):
        (o, lse), pull = jax.vjp(lambda *xs: forward(*xs, *given[len(arrays) :]), *given[: len(arrays)])
        return o, pull((cotangent, lse))

    q, v = arrays[0], arrays[2]
    cotangent = abstract(q.dtype, *q.shape[:3], v.shape[3])
    return [
        Program(f"scheduled_attention forward {what}", "pallas_tpu", forward, (*arrays, *fixed)),
        Program(
            f"scheduled_attention gradient {what}", "pallas_tpu", gradient, (cotangent, *arrays, *fixed), shape in QUICK
        ),
    ]


def window_programs(shape: tuple[Any, ...]) -> list[Program]:
    b, t, h, g, k, v, window, dtype, more = shape
    documents = "documents" in more
    query_tile, key_tile = tpu.tile_sizes(t, t, k, v, dtype, window=window)

    def forward(q, k_, v_, *rest):
        sinks, (segments, positions) = (rest[0] if "sinks" in more else None), rest[-2:]
        fields: dict[str, Any] = {"positions": np.arange(t)[None], "order": np.arange(t)[None]}
        if documents:
            fields |= {"positions": positions, "segments": segments}
        sizes: dict[str, Any] = {"scale": k**-0.5, "query_tile": query_tile, "key_tile": key_tile, "sinks": sinks}
        mask = causal(window, segmented=documents, ordered=True)
        return flash_vjp.attend(tpu, q, k_, v_, mask=mask, query_fields=fields, key_fields=fields, **sizes)

    arrays = [abstract(dtype, b, t, h, k), abstract(dtype, b, t, g, k), abstract(dtype, b, t, g, v)]
    arrays += [abstract("float32", h)] if "sinks" in more else []
    what = f"b{b} t{t} h{h}/{g} k{k} v{v} window {window} {dtype}" + (f" {more}" if more else "")
    return both(what, shape, forward, arrays, [abstract("int32", b, t)] * 2)


def gathered_programs(shape: tuple[Any, ...]) -> list[Program]:
    b, n, s, g, d, dtype = shape
    query_tile, key_tile = tpu.tile_sizes(n, s, d, d, dtype)

    def forward(q, k, v, key_heads, segments, positions):
        query = {"positions": positions, "segments": segments}
        key = {"positions": np.arange(s)[None], "segments": np.ones((1, s), np.int32)}
        rest: dict[str, Any] = {
            "scale": d**-0.5,
            "query_tile": query_tile,
            "key_tile": key_tile,
            "key_heads": key_heads,
        }
        return flash_vjp.attend(tpu, q, k, v, mask=causal(), query_fields=query, key_fields=key, **rest)

    arrays = [abstract(dtype, b, n, 1, d), *[abstract(dtype, b, s, g, d)] * 2]
    fixed = [abstract("int32", b, -(-n // query_tile)), *[abstract("int32", b, n)] * 2]
    return both(f"gathered b{b} n{n} s{s} h{g} d{d} {dtype}", shape, forward, arrays, fixed)


def landmark_programs(shape: tuple[Any, ...]) -> list[Program]:
    """Earlier blocks, and for documents the own one too."""
    b, t, h, g, d, block, dtype, more = shape
    documents, count = "documents" in more, t // (block + 1)
    query_tile, key_tile = tpu.tile_sizes(t, count * (block + 1), d, d, dtype, block=block)
    slots = count * key_tile

    def forward(q, k, v, segments, positions, key_segments):
        query: dict[str, Any] = {"blocks": (np.arange(t) // (block + 1))[None]}
        key: dict[str, Any] = {"blocks": np.repeat(np.arange(count), key_tile)[None]}
        if documents:
            query = {"blocks": jax.lax.div(positions, block + 1), "segments": segments}
            key = {"blocks": jnp.asarray(key["blocks"]), "segments": key_segments}
        rest: dict[str, Any] = {"scale": d**-0.5, "query_tile": query_tile, "key_tile": key_tile, "block": block}
        mask = EarlierBlock() & SameSegment() if documents else EarlierBlock()
        return flash_vjp.attend(tpu, q, k, v, mask=mask, query_fields=query, key_fields=key, **rest)

    arrays = [abstract(dtype, b, t, h, d), *[abstract(dtype, b, slots, g, d)] * 2]
    fixed = [*[abstract("int32", b, t)] * 2, abstract("int32", b, slots)]
    what = f"b{b} t{t} h{h}/{g} d{d} {dtype}" + (f" {more}" if more else "")
    earlier = both(f"earlier blocks of {block} {what}", shape, forward, arrays, fixed)
    if not documents:
        return earlier
    tiles = tpu.tile_sizes(t, t, d, d, dtype, window=block + 1)

    def own(q, k, v, segments, positions):
        fields = {
            "positions": positions,
            "segments": segments,
            "order": np.arange(t)[None],
            "blocks": jax.lax.div(positions, block + 1),
            "token_types": (jax.lax.rem(positions, block + 1) == block).astype(jnp.int32),
        }
        rest: dict[str, Any] = {"scale": d**-0.5, "query_tile": tiles[0], "key_tile": tiles[1]}
        mask = causal(segmented=True, ordered=True) & SameBlock() & IsOrdinary()
        return flash_vjp.attend(tpu, q, k, v, mask=mask, query_fields=fields, key_fields=fields, **rest)

    arrays = [abstract(dtype, b, t, h, d), *[abstract(dtype, b, t, g, d)] * 2]
    return earlier + both(f"own block of {block} {what}", (), own, arrays, [abstract("int32", b, t)] * 2)


PROGRAMS = [
    *(program for shape in WINDOWS for program in window_programs(shape)),
    *(program for shape in GATHERED for program in gathered_programs(shape)),
    *(program for shape in LANDMARKS for program in landmark_programs(shape)),
]
