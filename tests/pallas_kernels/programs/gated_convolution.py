"""Short and long convolutions at the shapes that experiments train: recall tasks, text, Based's published 360M and
1.3B models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.gated_convolution import long_convolution, short_convolution
from tests.pallas_kernels.programs import Program

# b, t, d, taps, dtype, what is given and asked for besides
SHORT = [
    (64, 64, 64, 3, "float32", "bias, out_gate"),
    (64, 256, 64, 3, "float32", "bias, out_gate"),
    (16, 256, 128, 4, "bfloat16", "silu"),
    (8, 2048, 2048, 3, "bfloat16", "out_gate, silu"),
    (8, 2048, 1536, 4, "bfloat16", "in_gate, out_gate, bias"),
    (2, 4096, 3584, 3, "bfloat16", "out_gate, silu, state, segments"),
    (2, 257, 60, 4, "float32", "in_gate, out_gate, bias, silu, state, segments"),
    (1, 1000, 768, 8, "bfloat16", "bias, state"),
    (4, 1, 64, 3, "bfloat16", "state"),
    (2, 63, 128, 1, "float32", "out_gate"),
]
QUICK_SHORT = {SHORT[3]}

# b, t, d, length of the filter, dtype
LONG = [
    (64, 64, 64, 64, "bfloat16"),
    (64, 256, 64, 256, "float32"),
    (8, 1024, 256, 1024, "bfloat16"),
    (8, 2048, 768, 2048, "bfloat16"),
    (64, 4096, 128, 4096, "bfloat16"),
    (4, 4096, 64, 4096, "float32"),
    (3, 1000, 36, 128, "bfloat16"),
]
QUICK_LONG = {LONG[3]}


def _pair(name: str, backend: str, forward: Any, result: Any, arguments: tuple[Any, ...], quick: bool) -> list[Program]:
    """Forward and gradient of a function of arrays, integers among them last."""

    def gradient(cotangents, *arguments):
        differentiable = [x for x in arguments if x.dtype != jnp.int32]
        fixed = arguments[len(differentiable) :]
        outputs, pull = jax.vjp(lambda *xs: forward(*xs, *fixed), *differentiable)
        return outputs, pull(cotangents)

    operation, _, sizes = name.partition(" ")
    return [
        Program(f"{operation} forward {sizes}", backend, forward, arguments, quick),
        Program(f"{operation} gradient {sizes}", backend, gradient, (result, *arguments), quick),
    ]


def short_programs(backend: str, shape: tuple[Any, ...], quick: bool) -> list[Program]:
    """The short convolution at one shape."""
    b, t, d, taps, dtype, more = shape
    x, channels = jax.ShapeDtypeStruct((b, t, d), dtype), jax.ShapeDtypeStruct((d,), jnp.float32)
    given = {"taps": jax.ShapeDtypeStruct((taps, d), jnp.float32)}
    given |= {name: array for name, array in (("bias", channels), ("in_gate", x), ("out_gate", x)) if name in more}
    state = jax.ShapeDtypeStruct((b, taps - 1, d), jnp.float32)
    if "state" in more:
        given["initial_state"] = state
    if "segments" in more:
        given["segment_ids"] = jax.ShapeDtypeStruct((b, t), jnp.int32)
        given["initial_segment"] = jax.ShapeDtypeStruct((b,), jnp.int32)
    names, returns, activation = list(given), "state" in more, "silu" if "silu" in more else "none"

    def forward(x, *rest):
        return short_convolution(
            x, **dict(zip(names, rest, strict=True)), activation=activation, return_state=returns, backend=backend
        )

    name = f"short_convolution b{b} t{t} d{d} taps{taps} {dtype}" + (f" {more}" if more else "")
    return _pair(name, backend, forward, (x, state if returns else None), (x, *given.values()), quick)


def long_programs(backend: str, shape: tuple[Any, ...], quick: bool) -> list[Program]:
    """The long convolution with a gate and a skip, at one shape."""
    b, t, d, length, dtype = shape
    x = jax.ShapeDtypeStruct((b, t, d), dtype)

    def forward(x, filter, out_gate, skip):
        return long_convolution(x, filter, out_gate=out_gate, skip=skip, backend=backend)

    arguments = (x, jax.ShapeDtypeStruct((length, d), jnp.float32), x, jax.ShapeDtypeStruct((d,), jnp.float32))
    return _pair(f"long_convolution b{b} t{t} d{d} length{length} {dtype}", backend, forward, x, arguments, quick)


PROGRAMS = [
    program
    for backend in ("pallas_tpu", "pallas_gpu")
    for programs, shapes, quick in ((short_programs, SHORT, QUICK_SHORT), (long_programs, LONG, QUICK_LONG))
    for shape in shapes
    if not (
        programs is long_programs and backend == "pallas_gpu" and shape[-1] == "float32"
    )  # refused: its products take bf16
    for program in programs(backend, shape, shape in quick)
]
