"""Head-mixture attention at the shapes that experiments and published models have: a recall model's, MoH's LLM-S and
LLM-B, LLaMA3-8B as MoH."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention
from tests.pallas_kernels.programs import Program

# b, t, routed heads, key heads, active, head size, dtype, what is given besides
TPU_SHAPES = [
    (8, 256, 6, 6, 3, 32, "float32", ""),
    (2, 1000, 6, 3, 3, 64, "bfloat16", "segments"),
    (1, 2048, 9, 9, 6, 64, "bfloat16", ""),
    (1, 2048, 12, 12, 4, 96, "bfloat16", "segments"),
    (1, 4096, 16, 4, 8, 128, "bfloat16", "segments"),
    (1, 4096, 16, 16, 8, 128, "bfloat16", ""),
]
GPU_SHAPES = [
    (8, 256, 6, 6, 3, 32, "bfloat16", ""),
    (2, 1000, 6, 3, 3, 64, "bfloat16", "segments"),
    (1, 2048, 9, 9, 6, 64, "bfloat16", ""),
    (1, 2048, 12, 12, 4, 96, "bfloat16", "segments"),
    (1, 4096, 16, 4, 8, 128, "bfloat16", "segments"),
    (1, 4096, 16, 16, 8, 128, "bfloat16", ""),
]
QUICK = {"pallas_tpu": {TPU_SHAPES[1]}, "pallas_gpu": {GPU_SHAPES[1]}}


def programs_at(backend: str, shape: tuple[Any, ...], quick: bool) -> list[Program]:
    """Forward and gradient at one shape; the gradient alone is quick, as it holds the forward pass too."""
    b, t, h, g, active, d, dtype, more = shape
    q, k = (jax.ShapeDtypeStruct((b, t, heads, d), dtype) for heads in (h, g))
    chosen, gates = (jax.ShapeDtypeStruct((b, t, h), kind) for kind in (jnp.bool_, jnp.float32))
    fields = (jax.ShapeDtypeStruct((b, t), jnp.int32),) * 2 if "segments" in more else ()

    def forward(q, k, v, gates, chosen, *fields):
        named = dict(zip(("query_segments", "query_positions"), fields, strict=False))
        return head_mixture_attention(q, k, v, chosen, gates=gates, active=active, backend=backend, **named)

    def gradient(cotangent, q, k, v, gates, *fixed):
        output, pull = jax.vjp(lambda *xs: forward(*xs, *fixed), q, k, v, gates)
        return output, pull(cotangent)

    name = f"b{b} t{t} h{h} g{g} active{active} d{d} {dtype}" + (f" {more}" if more else "")
    arguments = (q, k, k, gates, chosen, *fields)
    return [
        Program(f"head_mixture_attention forward {name}", backend, forward, arguments),
        Program(f"head_mixture_attention gradient {name}", backend, gradient, (q, *arguments), quick),
    ]


PROGRAMS = [
    program
    for backend, shapes in (("pallas_tpu", TPU_SHAPES), ("pallas_gpu", GPU_SHAPES))
    for shape in shapes
    for program in programs_at(backend, shape, shape in QUICK[backend])
]
