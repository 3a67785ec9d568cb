"""Scheduled attention on Hopper at the shapes that experiments train, forward and all gradients: windows, gathered
queries, landmark blocks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.masks import EarlierBlock, IsOrdinary, SameBlock, SameSegment, causal
from recollect.pallas_kernels.scheduled_attention import flash_vjp, gpu
from tests.pallas_kernels.programs import Program

# tokens, query heads, key heads, head size, window, what there is besides
WINDOWS = [
    (2048, 16, 16, 64, 512, ""),
    (2048, 16, 4, 128, 512, "documents sinks"),
    (4096, 16, 4, 64, 512, "documents sinks"),
    (4096, 16, 16, 128, None, ""),
    (4096, 16, 16, 128, None, "documents"),
    (16384, 16, 16, 64, 512, ""),
    (16384, 16, 16, 128, 512, ""),
    (16384, 16, 4, 64, 512, "sinks"),
    (16384, 16, 4, 128, 512, "sinks"),
    (2048, 16, 16, 96, 512, "sinks"),
]
# gathered queries, keys, key heads, head size, what there is besides
GATHERED = [(32768, 4096, 16, 128, ""), (32768, 4096, 16, 64, "documents"), (32768, 4096, 16, 128, "documents")]
# tokens, query heads, key heads, head size, ordinary keys a block, what there is besides
LANDMARKS = [
    (2048, 16, 16, 64, 50, ""),
    (4096, 16, 16, 64, 63, "documents"),
    (4096, 16, 4, 128, 50, "documents"),
    (4096, 16, 16, 128, 63, ""),
]
QUICK = {WINDOWS[3], GATHERED[2], LANDMARKS[2]}


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _gradients(attend: Any, arrays: dict[str, jax.Array], fields: Any) -> Any:
    (o, lse), pull = jax.vjp(lambda arrays: attend(arrays, fields), arrays)
    return o, lse, pull((o, lse))


def _window(t: int, h: int, g: int, d: int, window: int | None, more: str) -> Program:
    tiles = gpu.tile_sizes(t, t, d, d, jnp.bfloat16, window=window)
    order = np.arange(t, dtype=np.int32)[None]
    packed = "documents" in more

    def attend(arrays, segments):
        fields = {"positions": order, "order": order} | ({"segments": segments} if packed else {})
        mask = causal(window, segmented=packed, ordered=packed)
        call = {"mask": mask, "query_fields": fields, "key_fields": fields, "scale": d**-0.5}
        return flash_vjp.attend(gpu, **arrays, **call, query_tile=tiles[0], key_tile=tiles[1])

    arrays = {"q": _array(2, t, h, d), "k": _array(2, t, g, d), "v": _array(2, t, g, d)}
    if "sinks" in more:
        arrays["sinks"] = _array(h, dtype=jnp.float32)
    name = f"scheduled_attention gpu window {window} t{t} h{h} of {g} d{d} {more}".rstrip()
    return _program(name, attend, arrays, _array(2, t, dtype=jnp.int32), (t, h, g, d, window, more))


def _own_blocks(t: int, h: int, g: int, d: int, block: int) -> Program:
    tiles = gpu.tile_sizes(t, t, d, d, jnp.bfloat16, window=block + 1)

    mask = causal(segmented=True) & SameBlock() & IsOrdinary()

    def attend(arrays, fields):
        call = {"mask": mask, "query_fields": fields, "key_fields": fields, "scale": d**-0.5}
        return flash_vjp.attend(gpu, **arrays, **call, query_tile=tiles[0], key_tile=tiles[1])

    arrays = {"q": _array(2, t, h, d), "k": _array(2, t, g, d), "v": _array(2, t, g, d)}
    fields = {name: _array(2, t, dtype=jnp.int32) for name in ("positions", "segments", "blocks", "token_types")}
    return _program(f"scheduled_attention gpu own blocks {block} t{t} h{h} of {g} d{d}", attend, arrays, fields, ())


def _gathered(n: int, s: int, g: int, d: int, more: str) -> Program:
    tiles = gpu.tile_sizes(n, s, d, d, jnp.bfloat16)
    packed = "documents" in more

    def attend(arrays, fields):
        key_heads, positions, query_segments, key_segments = fields
        query, key = {"positions": positions}, {"positions": np.arange(s, dtype=np.int32)[None]}
        if packed:
            query, key = {**query, "segments": query_segments}, {**key, "segments": key_segments}
        call = {"mask": causal(segmented=packed), "query_fields": query, "key_fields": key, "scale": d**-0.5}
        return flash_vjp.attend(gpu, **arrays, **call, query_tile=tiles[0], key_tile=tiles[1], key_heads=key_heads)

    arrays = {"q": _array(2, n, 1, d), "k": _array(2, s, g, d), "v": _array(2, s, g, d)}
    fields = tuple(_array(2, size, dtype=jnp.int32) for size in (n // tiles[0], n, n, s))
    return _program(
        f"scheduled_attention gpu gathered n{n} s{s} g{g} d{d} {more}".rstrip(),
        attend,
        arrays,
        fields,
        (n, s, g, d, more),
    )


def _landmarks(t: int, h: int, g: int, d: int, block: int, more: str) -> Program:
    tiles = gpu.tile_sizes(t, t, d, d, jnp.bfloat16, block=block)
    blocks = t // (block + 1)
    s = blocks * tiles[1]
    packed = "documents" in more

    def attend(arrays, segments):
        query = {"blocks": (np.arange(t) // (block + 1)).astype(np.int32)[None]}
        key = {"blocks": np.repeat(np.arange(blocks, dtype=np.int32), tiles[1])[None]}
        if packed:
            query, key = ({**fields, "segments": x} for fields, x in zip((query, key), segments, strict=True))
        call = {
            "mask": EarlierBlock() & SameSegment() if packed else EarlierBlock(),
            "query_fields": query,
            "key_fields": key,
            "scale": d**-0.5,
            "block": block,
        }
        return flash_vjp.attend(gpu, **arrays, **call, query_tile=tiles[0], key_tile=tiles[1])

    arrays = {"q": _array(2, t, h, d), "k": _array(2, s, g, d), "v": _array(2, s, g, d)}
    segments = tuple(_array(2, size, dtype=jnp.int32) for size in (t, s))
    name = f"scheduled_attention gpu landmark blocks {block} t{t} h{h} of {g} d{d} {more}".rstrip()
    return _program(name, attend, arrays, segments, (t, h, g, d, block, more))


def _program(name: str, attend: Any, arrays: Any, fields: Any, case: tuple[Any, ...]) -> Program:
    return Program(name, "pallas_gpu", functools.partial(_gradients, attend), (arrays, fields), case in QUICK)


PROGRAMS = [_window(*case) for case in WINDOWS] + [_own_blocks(4096, 16, 4, d, 50) for d in (64, 128)]
PROGRAMS += [_gathered(*case) for case in GATHERED] + [_landmarks(*case) for case in LANDMARKS]
