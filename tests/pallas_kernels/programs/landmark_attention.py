"""Landmark attention at the shapes that experiments train: recall tasks with short blocks, text with the published
blocks of 50 and 63."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.landmark_attention import landmark_attention
from tests.pallas_kernels.programs import Program

# b, t, query heads, key heads, dimensions, ordinary tokens a block, dtype, what is given besides
TPU_SHAPES = [
    (16, 256, 2, 2, 32, 8, "float32", ""),
    (16, 256, 2, 1, 32, 8, "bfloat16", "segments"),
    (4, 256, 2, 2, 64, 50, "bfloat16", ""),
    (2, 2048, 8, 8, 64, 50, "bfloat16", ""),
    (2, 2048, 8, 2, 64, 63, "bfloat16", "segments"),
    (1, 2048, 8, 8, 128, 50, "float32", "segments"),
    (1, 4096, 16, 16, 128, 63, "bfloat16", ""),
    (1, 4096, 16, 4, 64, 63, "bfloat16", "segments"),
    (2, 1000, 2, 1, 64, 50, "bfloat16", "segments"),
]
GPU_SHAPES = [
    (16, 256, 2, 2, 32, 8, "bfloat16", ""),
    (4, 256, 2, 1, 64, 50, "bfloat16", "segments"),
    (2, 2048, 8, 8, 64, 50, "bfloat16", ""),
    (2, 2048, 8, 2, 64, 63, "bfloat16", "segments"),
    (1, 4096, 16, 16, 128, 63, "bfloat16", ""),
    (1, 4096, 16, 4, 128, 63, "bfloat16", "segments"),
    (2, 1000, 2, 1, 64, 50, "bfloat16", "segments"),
]
QUICK = {"pallas_tpu": {TPU_SHAPES[2]}, "pallas_gpu": {GPU_SHAPES[3]}}


def programs_at(backend: str, shape: tuple[Any, ...], quick: bool) -> list[Program]:
    """Forward and gradient at one shape; the gradient alone is quick, as it holds the forward pass too."""
    b, t, h, groups, dim, block, dtype, more = shape
    q, k = (jax.ShapeDtypeStruct((b, t, heads, dim), dtype) for heads in (h, groups))
    fields = (jax.ShapeDtypeStruct((b, t), jnp.int32),) * 2 if more else ()

    def forward(q, k, v, positions=None, segments=None):
        given = {"query_positions": positions, "query_segments": segments}
        return landmark_attention(q, k, v, block=block, **given, return_lse=True, backend=backend)

    def gradient(cotangents, q, k, v, *fields):
        outputs, pull = jax.vjp(lambda *x: forward(*x, *fields), q, k, v)
        return outputs, pull(cotangents)

    cotangents = (q, jax.ShapeDtypeStruct((b, t, h), jnp.float32))
    name = f"b{b} t{t} h{h} g{groups} d{dim} block{block} {dtype}" + (f" {more}" if more else "")
    return [
        Program(f"landmark_attention forward {name}", backend, forward, (q, k, k, *fields)),
        Program(f"landmark_attention gradient {name}", backend, gradient, (cotangents, q, k, k, *fields), quick),
    ]


PROGRAMS = [
    program
    for backend, shapes in (("pallas_tpu", TPU_SHAPES), ("pallas_gpu", GPU_SHAPES))
    for shape in shapes
    for program in programs_at(backend, shape, shape in QUICK[backend])
]
