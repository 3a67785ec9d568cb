"""The recurrence's walks on TPUs as its forward pass and its gradients use them
(pallas_kernels/linear_recurrence/kernel_vjp.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import tpu
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, ScanResult
from tests.pallas_kernels.programs import Program

# b, t, heads of q and k, heads of v, key dimensions, value dimensions, dtype, documents
SHAPES = [
    (16, 256, 1, 1, 64, 64, "float32", False),
    (2, 2048, 1, 1, 64, 64, "bfloat16", True),
    (2, 2048, 2, 2, 64, 128, "bfloat16", False),
    (2, 2048, 16, 16, 64, 64, "bfloat16", False),
    (2, 2048, 16, 16, 128, 128, "bfloat16", True),
]
GROUPED = (2, 2048, 1, 16, 128, 64, "bfloat16", False)  # Mamba-2's: one head of q and k
LARGEST = (1, 4096, 4, 4, 256, 256, "float32", True)
ODD = (2, 256, 3, 3, 60, 40, "float32", True)
# The last did not compile for v6e in another form, see tpu_chunk.outer.
QUICK = {("key", SHAPES[3], True), ("head", SHAPES[1], False), ("none", SHAPES[2], False)}
EVERY = 8  # chunks a checkpoint


@dataclasses.dataclass(frozen=True)
class _Call:
    """One shape, with abstract arrays for it."""

    b: int
    t: int
    sharing: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    documents: bool

    def rows(self, heads: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.b, self.t, heads, channels), self.dtype)

    def state(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.b, self.heads, self.key_dim, self.value_dim), jnp.float32)

    def chunks(self, decay: Any, size: int) -> Chunks:
        def fp32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shapes: dict[str, tuple[int, ...]] = {
            "head": (self.b, self.heads, self.t),
            "key": (self.b, self.t, self.heads, self.key_dim),
            "value": (self.b, self.t, self.heads, self.value_dim),
        }
        plain: Any = Chunks(size, decay, None if decay == "none" else fp32(*shapes[decay]))  # type: ignore[arg-type]
        if not self.documents:
            return plain
        token = fp32(self.b, self.t)
        segments = jax.ShapeDtypeStruct((self.b, self.t), jnp.int32)
        return dataclasses.replace(
            plain, segments=segments, starts=token, ends=token, keeps=fp32(self.b, self.t // size)
        )


def _turned(state: jax.Array) -> jax.Array:
    return jnp.swapaxes(state, -1, -2)


def _forward(heads: int) -> Callable[..., ScanResult]:
    def forward(q, k, v, chunks, state):
        return tpu.scan(q, k, v, chunks, heads=heads, scale=0.5, initial_state=state)

    return forward


def _gradient(heads: int, decay: str) -> Callable[..., tuple[ScanResult, ...]]:
    def gradient(q, k, v, do, chunks, state, dstate):
        turned = dataclasses.replace(chunks, decay="value" if decay == "key" else decay)
        more: dict[str, Any] = {"heads": heads, "scale": 0.5}
        wide = {"out_dtype": jnp.float32} if decay == "key" else {}
        dots = (lambda x: {"dot_with": x}) if decay == "head" else (lambda x: {})
        every = None if decay == "none" else EVERY
        to_q = tpu.scan(
            do, v, k, turned, initial_state=_turned(state), checkpoint_every=every, **dots(q), **wide, **more
        )
        to_k = tpu.scan(v, do, q, turned, initial_state=_turned(dstate), reverse=True, **dots(k), **wide, **more)
        return (
            to_q,
            to_k,
            tpu.scan(k, q, do, chunks, initial_state=dstate, reverse=True, checkpoint_every=every, **more),
        )

    return gradient


def _erase_forward(heads: int) -> Callable[..., ScanResult]:
    def forward(w, u, q, k, chunks, state):
        return tpu.delta_scan(w, u, k, chunks, heads=heads, q=q, scale=0.5, initial_state=state)

    return forward


def _erase_gradient(heads: int, decay: str) -> Callable[..., tuple[ScanResult, ...]]:
    def gradient(w, u, q, k, e, y, do, chunks, state, dstate):
        turned = dataclasses.replace(chunks, decay="value" if decay == "key" else decay)
        dual = tpu.delta_scan(
            w, u, e, chunks, heads=heads, second=(q, do), initial_state=dstate, reverse=True, checkpoint_every=EVERY
        )
        assert dual.y is not None
        more: dict[str, Any] = {
            "heads": heads,
            "scale": -1.0,
            "strict": True,
            "dot_with": e if decay == "head" else None,
        }
        to_e = tpu.scan(dual.y, y, k, turned, initial_state=_turned(state), **more)
        return dual, to_e, tpu.scan(y, dual.y, e, turned, reverse=True, **more)

    return gradient


def programs_at(shape: tuple[Any, ...], decay: str) -> list[Program]:
    """Forward pass and gradients of one shape and decay, nothing erased and with erasing."""
    call = _Call(*shape)
    b, t, _, heads, key_dim, value_dim, dtype, documents = shape
    q, v = call.rows(call.sharing, key_dim), call.rows(heads, value_dim)
    w = call.rows(heads, key_dim)
    name = f"{decay} b{b} t{t} h{call.sharing}/{heads} k{key_dim} v{value_dim} {dtype}" + (
        " documents" if documents else ""
    )

    def program(
        what: str, function: Callable[..., Any], erase: bool, *rows: jax.ShapeDtypeStruct, states: int
    ) -> Program:
        size = tpu.chunk_size(decay, erase, key_dim, value_dim, dtype)  # type: ignore[arg-type]
        arguments = (*rows, call.chunks(decay, size), *[call.state()] * states)
        return Program(
            f"linear_recurrence walks {what} {name}", "pallas_tpu", function, arguments, (decay, shape, erase) in QUICK
        )

    return [
        program("forward", _forward(heads), False, q, q, v, states=1),
        program("gradient", _gradient(heads, decay), False, q, q, v, v, states=2),
        program("delta forward", _erase_forward(heads), True, w, v, q, q, states=1),
        program("delta gradient", _erase_gradient(heads, decay), True, w, v, q, q, w, v, v, states=2),
    ]


PROGRAMS = [
    *(
        program
        for shape in (*SHAPES, ODD)
        for decay in ("none", "head", "key")
        for program in programs_at(shape, decay)
    ),
    *(program for decay in ("head", "key") for program in programs_at(GROUPED, decay)),
    *programs_at(LARGEST, "key"),
]
