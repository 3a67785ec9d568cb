"""Window attention by jax's splash attention, at the shapes of text experiments and of the long windows that
benchmarks time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.softmax_attention import splash
from tests.pallas_kernels.programs import Program

# b, t, heads, key heads, key dimensions, value dimensions, window, what is given besides
SHAPES: list[tuple[int, int, int, int, int, int, int | None, str]] = [
    (8, 256, 2, 2, 64, 64, None, ""),
    (2, 1000, 4, 2, 32, 32, 100, "segments, sinks"),
    (2, 2048, 16, 4, 64, 64, None, "segments"),
    (1, 4096, 16, 16, 128, 128, 512, "sinks"),
    (1, 4096, 16, 4, 128, 128, None, ""),
    (1, 16384, 16, 16, 64, 64, 512, ""),
    (1, 1024, 2, 2, 256, 256, None, "segments"),
    (1, 1024, 2, 1, 40, 24, 200, "sinks"),
]
QUICK = {SHAPES[1]}


def programs_at(shape: tuple[int, int, int, int, int, int, int | None, str], quick: bool) -> list[Program]:
    """Forward and gradient at one shape; of quick ones the gradient, which holds the forward kernel too."""
    b, t, h, g, k, v, window, more = shape
    o = jax.ShapeDtypeStruct((b, t, h, v), jnp.bfloat16)
    arguments: list[Any] = [jax.ShapeDtypeStruct((b, t, *sizes), jnp.bfloat16) for sizes in ((h, k), (g, k), (g, v))]
    with_sinks, packed = "sinks" in more, "segments" in more
    arguments += [jax.ShapeDtypeStruct((h,), jnp.float32)] if with_sinks else []
    given = [jax.ShapeDtypeStruct((b, t), jnp.int32)] if packed else []

    def forward(*inputs):
        q, k, v = inputs[:3]
        sinks = inputs[3] if with_sinks else None
        segments = inputs[-1] if packed else None
        return splash.softmax_attention(q, k, v, window=window, sinks=sinks, query_segments=segments, scale=0.125)[0]

    def gradient(cotangent, *inputs):
        differentiable = inputs[: len(arguments)]
        out, pull = jax.vjp(lambda *xs: forward(*xs, *inputs[len(arguments) :]), *differentiable)
        return out, pull(cotangent)

    name = f"b{b} t{t} h{h} g{g} k{k} v{v} w{window}" + (f" {more}" if more else "")
    return [
        Program(f"softmax_attention by splash forward {name}", "pallas_tpu", forward, (*arguments, *given)),
        Program(f"softmax_attention by splash gradient {name}", "pallas_tpu", gradient, (o, *arguments, *given), quick),
    ]


PROGRAMS = [program for shape in SHAPES for program in programs_at(shape, shape in QUICK)]
