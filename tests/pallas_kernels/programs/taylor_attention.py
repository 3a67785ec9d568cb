"""Taylor attention at the shapes that experiments train: recall tasks with one head, text, Based's published 360M
and 1.3B models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.taylor_attention import taylor_attention
from recollect.pallas_kernels.taylor_attention.features import count
from tests.pallas_kernels.programs import Program

# b, t, heads, key dimensions, value dimensions, dtype, what is given and asked for besides
TPU_SHAPES = [
    (64, 64, 1, 8, 64, "float32", ""),
    (64, 256, 1, 16, 64, "float32", ""),
    (16, 256, 4, 8, 32, "bfloat16", ""),
    (2, 2048, 2, 16, 128, "bfloat16", ""),
    (2, 2048, 16, 16, 64, "bfloat16", ""),
    (2, 2048, 16, 16, 64, "bfloat16", "state, segments"),
    (1, 2048, 2, 16, 64, "float32", "state, segments"),
    (1, 4096, 16, 16, 112, "bfloat16", "segments"),
    (2, 257, 3, 5, 24, "float32", "state, segments"),
    (2, 1000, 4, 24, 64, "bfloat16", "state"),
    (1, 256, 2, 32, 64, "float32", ""),
]
GPU_SHAPES = [
    (64, 64, 1, 8, 64, "bfloat16", ""),
    (64, 256, 1, 16, 64, "bfloat16", "state, segments"),
    (16, 256, 4, 8, 32, "bfloat16", ""),
    (2, 2048, 2, 16, 128, "bfloat16", "state"),
    (2, 2048, 16, 16, 64, "bfloat16", ""),
    (2, 2048, 16, 16, 64, "bfloat16", "state, segments"),
    (1, 4096, 16, 16, 112, "bfloat16", "segments"),
    (2, 1000, 3, 11, 24, "bfloat16", "state"),
    (2, 8192, 16, 16, 64, "bfloat16", ""),  # the benchmark's, in four spans of time
    (1, 5000, 16, 16, 64, "bfloat16", "state, segments"),  # spans of 20, 20, 20 and 19 chunks
]
QUICK = {"pallas_tpu": {TPU_SHAPES[2], TPU_SHAPES[8]}, "pallas_gpu": {GPU_SHAPES[0], GPU_SHAPES[5]}}


def programs_at(backend: str, shape: tuple[Any, ...], quick: bool) -> list[Program]:
    """Forward and gradient at one shape."""
    b, t, h, k, v, dtype, more = shape
    q = jax.ShapeDtypeStruct((b, t, h, k), dtype)
    given: dict[str, jax.ShapeDtypeStruct] = {"v": jax.ShapeDtypeStruct((b, t, h, v), dtype)}
    if "state" in more:
        given["initial_state"] = jax.ShapeDtypeStruct((b, h, count(k), v + 1), jnp.float32)
    if "segments" in more:
        given["segment_ids"] = jax.ShapeDtypeStruct((b, t), jnp.int32)
        given["initial_segment"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    names, returns = list(given), "state" in more

    def forward(q, k, *rest):
        return taylor_attention(q, k, **dict(zip(names, rest, strict=True)), return_state=returns, backend=backend)

    def gradient(cotangents, *arguments):
        differentiable = [x for x in arguments if x.dtype != jnp.int32]
        fixed = arguments[len(differentiable) :]
        outputs, pull = jax.vjp(lambda *xs: forward(*xs, *fixed), *differentiable)
        return outputs, pull(cotangents)

    cotangents = (given["v"], given.get("initial_state"))
    name = f"b{b} t{t} h{h} k{k} v{v} {dtype}" + (f" {more}" if more else "")
    arguments = (q, q, *given.values())
    return [
        Program(f"taylor_attention forward {name}", backend, forward, arguments, quick),
        Program(f"taylor_attention gradient {name}", backend, gradient, (cotangents, *arguments), quick),
    ]


PROGRAMS = [
    program
    for backend, shapes in (("pallas_tpu", TPU_SHAPES), ("pallas_gpu", GPU_SHAPES))
    for shape in shapes
    for program in programs_at(backend, shape, shape in QUICK[backend])
]
