"""The recurrence's walks on Hopper, each kernel alone with everything that can be asked of it, so that its registers can be read off."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import gpu
from pallas_kernels.linear_recurrence.walks import Chunks, Decay
from tests.pallas_kernels.programs import Program

B, T, HEADS = 2, 2048, 16
EVERY = 2  # chunks a checkpoint
EXPONENTIALS = 220  # at most in a kernel, whose loop takes a chunk a turn, at key sizes up to 128
# decay, key size, value size, heads of q and k, what is asked for besides
PLAIN = [
    (decay, key_dim, value_dim, HEADS, more)
    for decay in ("none", "head", "key", "value")
    for key_dim, value_dim in ((64, 64), (128, 128))
    for more in ("", "reverse documents", "reverse strict documents state dots checkpoints")
]
PLAIN += [
    ("none", 192, 64, HEADS, ""),
    ("head", 64, 128, 1, "documents state"),
    ("head", 256, 256, HEADS, "documents state dots checkpoints"),
    ("key", 128, 64, HEADS, "reverse state checkpoints"),
    ("key", 64, 128, HEADS, "state"),
    ("value", 64, 128, HEADS, "strict wide state checkpoints"),
    ("value", 128, 128, HEADS, "strict wide documents reverse state checkpoints"),
    ("key", 192, 192, HEADS, "reverse documents state checkpoints"),
    ("value", 192, 192, HEADS, "strict wide reverse state checkpoints"),
    ("value", 256, 192, HEADS, "strict wide documents state checkpoints"),
    ("value", 256, 128, HEADS, "strict wide state checkpoints"),
]
# Forwards with queries; as a gradient, from the end, with a second pair written.
DELTA = [
    (decay, size, size, HEADS, more)
    for decay in ("none", "head", "key")
    for size in (64, 128)
    for more in ("queries", "queries documents state", "second reverse documents state checkpoints")
]
DELTA += [
    ("head", 256, 256, HEADS, "queries documents state"),
    ("none", 64, 128, 1, "queries"),
    ("key", 128, 64, HEADS, "second reverse state"),
    ("key", 128, 256, HEADS, "queries documents state"),
    ("key", 192, 192, HEADS, "queries documents state"),
    ("key", 192, 192, HEADS, "second reverse documents state checkpoints"),
]
QUICK = {PLAIN[8], PLAIN[12], PLAIN[15], DELTA[10]}


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _chunks(decay: Decay, key_dim: int, value_dim: int, documents: bool) -> Any:
    wide = {"dtype": jnp.float32}
    total = {
        "none": None,
        "head": _array(B, HEADS, T, **wide),
        "key": _array(B, T, HEADS, key_dim, **wide),
        "value": _array(B, T, HEADS, value_dim, **wide),
    }[decay]
    more = {}
    if documents:
        more = {name: _array(B, T, **wide) for name in ("starts", "ends")} | {"keeps": _array(B, T // gpu.CHUNK, **wide)}
        more["segments"] = _array(B, T, dtype=jnp.int32)
    return Chunks(gpu.CHUNK, decay, total, **more)  # type: ignore[arg-type]


def _walk(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    state = _array(B, HEADS, key_dim, value_dim, dtype=jnp.float32) if "state" in more else None
    dot_with = _array(B, T, HEADS, value_dim) if "dots" in more else None

    def function(q, k, v, chunks, state, dot_with):
        return gpu.walk(
            q,
            k,
            v,
            chunks,
            heads=HEADS,
            scale=0.5,
            initial_state=state,
            reverse="reverse" in more,
            strict="strict" in more,
            dot_with=dot_with,
            checkpoint_every=EVERY if "checkpoints" in more else None,
            out_dtype=jnp.float32 if "wide" in more else None,
        )

    keyed = _array(B, T, sharing, key_dim)
    chunks = _chunks(decay, key_dim, value_dim, "documents" in more)
    arguments = (keyed, keyed, _array(B, T, HEADS, value_dim), chunks, state, dot_with)
    quick = (decay, key_dim, value_dim, sharing, more) in QUICK
    name, special = _name("walk", decay, key_dim, value_dim, sharing, more), EXPONENTIALS if key_dim <= 128 else None
    return Program(name, "pallas_gpu", function, arguments, quick, special)


def _delta(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    keyed, valued = _array(B, T, HEADS, key_dim), _array(B, T, HEADS, value_dim)
    shared = _array(B, T, sharing, key_dim)
    given = {"q": shared} if "queries" in more else {}
    given |= {"second": (shared, valued)} if "second" in more else {}
    given |= {"initial_state": _array(B, HEADS, key_dim, value_dim, dtype=jnp.float32)} if "state" in more else {}

    def function(w, u, k, chunks, given):
        every = EVERY if "checkpoints" in more else None
        return gpu.delta_walk(w, u, k, chunks, heads=HEADS, reverse="reverse" in more, checkpoint_every=every, **given)

    arguments = (keyed, valued, shared, _chunks(decay, key_dim, value_dim, "documents" in more), given)
    quick = (decay, key_dim, value_dim, sharing, more) in QUICK
    name, special = _name("delta_walk", decay, key_dim, value_dim, sharing, more), EXPONENTIALS if key_dim <= 128 else None
    return Program(name, "pallas_gpu", function, arguments, quick, special)


def _name(which: str, decay: str, key_dim: int, value_dim: int, sharing: int, more: str) -> str:
    shared = "" if sharing == HEADS else f" of {sharing}"
    return f"linear_recurrence gpu {which} {decay} k{key_dim} v{value_dim} h{HEADS}{shared} {more}".rstrip()


PROGRAMS = [_walk(*case) for case in PLAIN] + [_delta(*case) for case in DELTA]
