"""The recurrence on kernels: forward, and the gradient of everything, at sizes that experiments train."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from tests.pallas_kernels.programs import Program

KINDS = ("no decay", "decay per head", "decay per channel", "delta", "gated delta", "gated delta per channel")
# Each at one shape: the other kinds' kernels, otherwise combined.
MORE_KINDS = (
    "decay of columns",
    "gated delta before its decay",
    "gated delta per channel before its decay, a key apart",
)
# b, t, h, key and value size. The last is text.based's, the one before few heads and a long sequence, cut in spans on
# a GPU.
SHAPES = ((2, 2048, 16, 64, 64), (2, 2048, 16, 128, 128), (1, 8192, 2, 64, 64), (8, 256, 4, 32, 32))
# The benchmark's long case: few rows, so that a GPU cuts it in spans; nothing is asked for but o.
BENCHMARK = (2, 16384, 16, 128, 128)
# The inverse makes the delta rule's gradient half a minute's work for TPU compilers.
QUICK = {
    "pallas_gpu": {
        ("gated delta", (2, 2048, 16, 128, 128), "gradient"),
        ("decay per head", (2, 2048, 16, 64, 64), "forward"),
        ("no decay", BENCHMARK, "forward"),
    },
    "pallas_tpu": {
        ("gated delta", (2, 2048, 16, 64, 64), "forward"),
        ("decay per head", (2, 2048, 16, 128, 128), "gradient"),
    },
}


def _arguments(kind: str, b: int, t: int, h: int, k: int, v: int) -> dict[str, jax.ShapeDtypeStruct]:
    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    given = {
        "q": array(b, t, h, k),
        "k": array(b, t, h, k),
        "v": array(b, t, h, v),
        "initial_state": array(b, h, k, v, dtype=jnp.float32),
    }
    if kind in ("decay per head", "gated delta", "gated delta before its decay"):
        given["log_decay"] = array(b, t, h, dtype=jnp.float32)
    if kind == "decay of columns":
        given["value_log_decay"] = array(b, t, h, v, dtype=jnp.float32)
    if "per channel" in kind:
        given["log_decay"] = array(b, t, h, k, dtype=jnp.float32)
    if "delta" in kind:
        given |= {"erase_read": array(b, t, h, k), "write_strength": array(b, t, h, dtype=jnp.float32)}
    if "apart" in kind:
        given["erase_write"] = array(b, t, h, k)
    return given


def _program(kind: str, shape: tuple[int, ...], part: str, backend: str) -> Program:
    b, t, h, k, v = shape
    given = _arguments(kind, *shape)
    if shape == BENCHMARK:
        del given["initial_state"]
    packed = shape != BENCHMARK
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32) if packed else None
    first = jax.ShapeDtypeStruct((b,), jnp.int32) if packed else None

    def forward(given, segments, first):
        return linear_recurrence(
            **given,
            erase_before_decay="before" in kind,
            segment_ids=segments,
            initial_segment=first,
            scale=k**-0.5,
            return_state=packed,
            backend=backend,
        )

    def gradient(given, segments, first):
        def loss(given):
            o, state = forward(given, segments, first)
            return jnp.sum(jnp.sin(o.astype(jnp.float32))) + (jnp.sum(jnp.sin(state)) if packed else 0)

        return jax.grad(loss)(given)

    return Program(
        name=f"linear_recurrence {kind} {part} b{b} t{t} h{h} k{k} v{v}",
        backend=backend,
        function=forward if part == "forward" else gradient,
        arguments=(given, segments, first),
        quick=(kind, shape, part) in QUICK[backend],
    )


PROGRAMS = [
    _program(kind, shape, part, backend)
    for backend in ("pallas_gpu", "pallas_tpu")
    for shape, kinds in [
        *((shape, KINDS) for shape in (*SHAPES, *((BENCHMARK,) if backend == "pallas_gpu" else ()))),
        (SHAPES[0], MORE_KINDS),
    ]
    for kind in kinds
    for part in ("forward", "gradient")
]
