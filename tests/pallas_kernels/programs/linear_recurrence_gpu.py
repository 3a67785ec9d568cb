"""The recurrence's walks on Hopper, each kernel alone with everything that can be asked of it, so that its registers
can be read off."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import gpu
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, Decay
from recollect.pallas_kernels.tuning import forced
from tests.pallas_kernels.programs import Program

B, T, HEADS = 2, 2176, 16  # a length of its own: of a kernel that the process has compiled already ptxas says nothing
EVERY = 2  # chunks a checkpoint
PIECES = 3  # of time: the last has fewer chunks
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
PLAIN += [
    (decay, key_dim, value_dim, HEADS, more + "documents state checkpoints spans")
    for decay, key_dim, value_dim, more in [
        ("none", 128, 128, ""),
        ("head", 128, 128, "reverse dots "),
        ("head", 256, 256, "dots "),
        ("key", 128, 128, "reverse strict dots "),
        ("key", 192, 192, "reverse "),
        ("value", 128, 128, "reverse strict wide "),
        ("value", 192, 192, "strict wide "),
        ("value", 256, 192, "strict wide "),
    ]
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
DELTA += [
    (decay, size, size, HEADS, more + "documents state checkpoints spans")
    for decay, size in (("none", 128), ("head", 256), ("key", 128), ("key", 192))
    for more in ("queries ", "second reverse ")
]
# Two walks in one, as gradients have them: decay, key size, value size, heads of k and v, what is asked for besides.
JOINED = [
    (decay, size, size, HEADS, more)
    for decay in ("none", "head")
    for size in (64, 128)
    for more in (
        "queries",
        "queries documents state dots checkpoints",
        "second reverse strict",
        "second reverse strict documents state dots",
    )
]
JOINED += [
    ("head", 256, 256, 1, "queries documents state dots checkpoints"),
    ("head", 256, 256, 1, "second reverse strict documents state dots"),
]
# The triangular systems of a chunk: decay, key size, value size, heads of k, what is asked for besides.
SOLVE = [
    (decay, size, size, HEADS, more)
    for decay in ("none", "head", "key")
    for size in (64, 128)
    for more in ("", "documents strength", "transposed", "transposed documents")
]
SOLVE += [
    ("head", 256, 256, 1, "documents strength"),
    ("head", 256, 256, 1, "transposed documents"),
    ("key", 192, 256, HEADS, "documents strength"),
    *(("key", size, size, HEADS, "strength sums") for size in (64, 128, 192)),
    ("key", 128, 128, HEADS, "documents sums"),
    ("key", 192, 256, HEADS, "transposed documents"),
]
QUICK = {PLAIN[8], PLAIN[12], PLAIN[15], DELTA[10], SOLVE[13], SOLVE[20], JOINED[5]}


def _spans(more: str) -> Any:
    return forced(**{"linear_recurrence.gpu_spans": {"spans": PIECES if "spans" in more else 1}})


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
        more = {name: _array(B, T, **wide) for name in ("starts", "ends")} | {
            "keeps": _array(B, T // gpu.CHUNK, **wide)
        }
        more["segments"] = _array(B, T, dtype=jnp.int32)
    return Chunks(gpu.CHUNK, decay, total, **more)  # type: ignore[arg-type]


def _scan(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    state = _array(B, HEADS, key_dim, value_dim, dtype=jnp.float32) if "state" in more else None
    dot_with = _array(B, T, HEADS, value_dim) if "dots" in more else None

    def function(q, k, v, chunks, state, dot_with):
        with _spans(more):
            return gpu.scan(
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


def _joined(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    keyed, valued = _array(B, T, HEADS, key_dim), _array(B, T, HEADS, value_dim)
    shared, shared_value = _array(B, T, sharing, key_dim), _array(B, T, sharing, value_dim)
    given: dict[str, Any] = {"second_q": keyed} if "queries" in more else {"second": (keyed, shared_value)}
    given |= {"dot_with": shared_value} if "dots" in more else {}
    given |= {"second_dot_with": valued} if "dots" in more and "queries" in more else {}
    given |= {"initial_state": _array(B, HEADS, key_dim, value_dim, dtype=jnp.float32)} if "state" in more else {}

    def function(q, k, v, chunks, given):
        settings = {
            "reverse": "reverse" in more,
            "strict": "strict" in more,
            "checkpoint_every": EVERY if "checkpoints" in more else None,
        }
        return gpu.scan(q, k, v, chunks, heads=HEADS, scale=0.5, second_scale=-0.5, **settings, **given)

    arguments = (keyed, shared, valued, _chunks(decay, key_dim, value_dim, "documents" in more), given)
    quick = (decay, key_dim, value_dim, sharing, more) in QUICK
    return Program(
        _name("joined walk", decay, key_dim, value_dim, sharing, more), "pallas_gpu", function, arguments, quick
    )


def _delta(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    keyed, valued = _array(B, T, HEADS, key_dim), _array(B, T, HEADS, value_dim)
    shared = _array(B, T, sharing, key_dim)
    given = {"q": shared} if "queries" in more else {}
    given |= {"second": (shared, valued)} if "second" in more else {}
    given |= {"initial_state": _array(B, HEADS, key_dim, value_dim, dtype=jnp.float32)} if "state" in more else {}

    def function(w, u, k, chunks, given):
        every = EVERY if "checkpoints" in more else None
        with _spans(more):
            return gpu.delta_scan(
                w, u, k, chunks, heads=HEADS, reverse="reverse" in more, checkpoint_every=every, **given
            )

    arguments = (keyed, valued, shared, _chunks(decay, key_dim, value_dim, "documents" in more), given)
    quick = (decay, key_dim, value_dim, sharing, more) in QUICK
    name, special = (
        _name("delta_scan", decay, key_dim, value_dim, sharing, more),
        EXPONENTIALS if key_dim <= 128 else None,
    )
    return Program(name, "pallas_gpu", function, arguments, quick, special)


def _solve(decay: Any, key_dim: int, value_dim: int, sharing: int, more: str) -> Program:
    keyed, valued, shared = _array(B, T, HEADS, key_dim), _array(B, T, HEADS, value_dim), _array(B, T, sharing, key_dim)
    chunks = _chunks(decay, key_dim, value_dim, "documents" in more)
    name, quick = (
        _name("solve", decay, key_dim, value_dim, sharing, more),
        (decay, key_dim, value_dim, sharing, more) in QUICK,
    )
    if "transposed" in more:

        def transposed(inverse, q, k, do, chunks):
            return gpu.solve_transposed(inverse, q, k, do, chunks, heads=HEADS, scale=0.5)

        inverse = _array(B, HEADS, T // gpu.CHUNK, gpu.CHUNK, gpu.CHUNK)
        return Program(name, "pallas_gpu", transposed, (inverse, shared, shared, valued, chunks), quick)

    def forwards(e, k, v, chunks, strength, log_decay):
        return gpu.solve(e, k, v, chunks, heads=HEADS, strength=strength, log_decay=log_decay)

    strength = _array(B, T, HEADS, dtype=jnp.float32) if "strength" in more else None
    log_decay = None
    if "sums" in more:
        chunks, log_decay = dataclasses.replace(chunks, total=None), chunks.total
    return Program(name, "pallas_gpu", forwards, (keyed, shared, valued, chunks, strength, log_decay), quick)


def _name(which: str, decay: str, key_dim: int, value_dim: int, sharing: int, more: str) -> str:
    shared = "" if sharing == HEADS else f" of {sharing}"
    return f"linear_recurrence gpu {which} {decay} k{key_dim} v{value_dim} h{HEADS}{shared} {more}".rstrip()


PROGRAMS = (
    [_scan(*case) for case in PLAIN]
    + [_joined(*case) for case in JOINED]
    + [_delta(*case) for case in DELTA]
    + [_solve(*case) for case in SOLVE]
)
