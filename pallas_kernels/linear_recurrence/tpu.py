"""The walks of chunk_scan.py as Mosaic TPU kernels.

One program walks the chunks of a few heads, with their states (k, v) fp32 in vector memory; batch rows and groups of
heads run in any order. Rows stay as the layers have them, (b, t, h, d), read as (b, t, h d): a block is the rows of one
chunk and of as many heads as fill whole lanes, so nothing is transposed or padded in memory. Where only all heads
together would do and those do not fit, rows are transposed to (b, h, t, d) first. What there is one of a token, (b, h,
t), is stored as rows of c lanes; a column would take 128 times its size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.linear_recurrence import tpu_blocks, tpu_chunk
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, ScanKernels, ScanResult
from recollect.pallas_kernels.linear_recurrence.recurrence import Decay
from recollect.pallas_kernels.linear_recurrence.tpu_chunk import BASE, ScanKind
from recollect.pallas_kernels.linear_recurrence.tpu_inverse import solve, solve_transposed

LARGEST_HEAD = 256


def refuses(key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike, decay: Decay, erase: bool) -> str | None:
    """Why these kernels cannot serve heads of key_dim and value_dim in dtype; None if they can."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"the TPU kernels take bfloat16 and float32; this is {jnp.dtype(dtype).name}"
    if max(key_dim, value_dim) > LARGEST_HEAD:
        return f"the TPU kernels take head sizes up to {LARGEST_HEAD}; these are {key_dim} and {value_dim}"
    return None


def chunk_size(decay: Decay, erase: bool, key_dim: int, value_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Tokens a chunk: 128 fill the matrix unit. Erasing takes an inverse c x c besides, which costs c^2 a token."""
    return 64 if erase else 128


def scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunks: Chunks,
    *,
    heads: int,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    strict: bool = False,
    dot_with: jax.Array | None = None,
    checkpoint_every: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> ScanResult:
    """See chunk_scan.ChunkScan.

    Raises:
      ValueError: chunks of a size these kernels do not have, or an operand's shape does not fit.
    """
    rows = {"q": q, "k": k, "v": v}
    if dot_with is not None:
        rows["dot_with"] = dot_with
    kind = ScanKind(chunks.size, chunks.decay, reverse, strict, float(scale))
    return _scan(rows, chunks, kind, heads, initial_state, checkpoint_every, jnp.dtype(out_dtype or v.dtype))


def delta_scan(
    w: jax.Array,
    u: jax.Array,
    k: jax.Array,
    chunks: Chunks,
    *,
    heads: int,
    q: jax.Array | None = None,
    second: tuple[jax.Array, jax.Array] | None = None,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    checkpoint_every: int | None = None,
    keeps_y: bool = True,
) -> ScanResult:
    """See chunk_scan.DeltaScan.

    Raises:
      ValueError: a decay on the channels of v, chunks of a size these kernels do not have, or an operand's shape does
        not fit.
    """
    if chunks.decay == "value":
        raise ValueError("delta_scan: a decay on the channels of v is not served")
    rows = {"w": w, "k": k, "v": u}
    if q is not None:
        rows["q"] = q
    if second is not None:
        rows |= {"second_k": second[0], "second_v": second[1]}
    kind = ScanKind(chunks.size, chunks.decay, reverse, False, float(scale))
    return _scan(rows, chunks, kind, heads, initial_state, checkpoint_every, jnp.dtype(u.dtype), keeps_y)


def _scan(
    rows: dict[str, jax.Array],
    chunks: Chunks,
    kind: ScanKind,
    heads: int,
    initial_state,
    every: int | None,
    out_dtype,
    keeps_y=False,
) -> ScanResult:
    b, t, _, value_dim = rows["v"].shape
    key_dim, c = rows["k"].shape[3], chunks.size
    tpu_blocks.check(rows, chunks, heads)
    compute = jnp.dtype(jnp.bfloat16) if all(x.dtype == jnp.bfloat16 for x in rows.values()) else jnp.dtype(jnp.float32)
    rows = {name: x.astype(compute) for name, x in rows.items()}
    n = t // c
    groups = None if every is None else -(-n // every)
    given = dict(rows)
    if chunks.total is not None and chunks.decay in ("key", "value"):
        given["total"] = chunks.total
    produced: dict[str, Any] = dict.fromkeys((["o"] if "q" in rows else []) + (["y"] if keeps_y else []), out_dtype)
    plan = tpu_blocks.plan_heads(given, produced, heads, key_dim, value_dim, c)
    placed = tpu_blocks.BlockLayout(plan, b, n, c, kind.reverse)
    inputs = [(name, *placed.rows(x)) for name, x in given.items()]
    inputs += placed.weights(chunks)
    if initial_state is not None:
        inputs.append(("initial_state", *placed.state(initial_state.astype(jnp.float32))))
    outputs = [(name, *placed.new_rows(value_dim, dtype)) for name, dtype in produced.items()]
    if "dot_with" in rows:
        outputs.append(("dots", *placed.new_a_token()))
    outputs.append(("state", *placed.new_state(key_dim, value_dim)))
    if every is not None:
        outputs.append(("checkpoints", *placed.new_checkpoints(key_dim, value_dim, groups, every)))
    held = {name: plan.held(x.shape[2]) for name, x in given.items()}
    together = tpu_blocks.side_by_side(plan.group, held.values(), key_dim, value_dim)
    kind = dataclasses.replace(kind, heads=together)
    names = (*(name for name, *_ in inputs), *(name for name, *_ in outputs))
    how = dispatch.interpretation()
    found = pl.pallas_call(
        functools.partial(_kernel, names=names, kind=kind, group=plan.group, held=held, every=every),
        grid=(b, heads // plan.group, n),
        in_specs=[spec for *_, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[shape for _, shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM((plan.group // together, together * key_dim, together * value_dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(inputs, outputs, b * heads * n, kind, rows, key_dim, value_dim),
        interpret=pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values",
        name="_".join(
            ("recurrence", "delta" if "w" in rows else "walk", kind.decay, *(["reverse"] if kind.reverse else []))
        ),
    )(*(x for _, x, _ in inputs))
    results = dict(zip((name for name, *_ in outputs), found, strict=True))
    results |= {name: placed.as_rows(results[name], value_dim) for name in produced}
    if "dots" in results:
        results["dots"] = results["dots"].reshape(b, heads, t)
    return ScanResult(**{"o": None, **results})


def _kernel(*refs, names, kind: ScanKind, group: int, held: dict[str, int], every: int | None) -> None:
    *blocks, state = refs
    ref = dict(zip(names, blocks, strict=True))
    step, n = pl.program_id(2), pl.num_programs(2)
    at = n - 1 - step if kind.reverse else step

    @pl.when(step == 0)
    def _():
        if "initial_state" not in ref or kind.heads > 1:
            state[...] = jnp.zeros_like(state)
        if "initial_state" in ref:
            for head in range(group):
                state[_state_of(state, head, kind.heads)] = ref["initial_state"][0, head]

    if every is not None:
        entry = lax.rem(at, every) == (every - 1 if kind.reverse else 0)

        @pl.when((step == 0) | entry)
        def _():
            for head in range(group):
                ref["checkpoints"][0, head, 0] = state[_state_of(state, head, kind.heads)]

    documents = tpu_blocks.documents(ref) if "segments" in ref else None
    raw: dict[tuple[int, int], list[jax.Array]] = {}
    for pack in range(group // kind.heads):
        _some_heads(ref, state, pack, kind, group, held, documents, raw)

    @pl.when(step == n - 1)
    def _():
        for head in range(group):
            ref["state"][0, head] = state[_state_of(state, head, kind.heads)]


def _state_of(state, head: int, heads: int) -> tuple[int, slice, slice]:
    """Where in the states at work, (packs, heads k, heads v), one head's is."""
    key_dim, value_dim = state.shape[1] // heads, state.shape[2] // heads
    pack, at = divmod(head, heads)
    return pack, slice(at * key_dim, (at + 1) * key_dim), slice(at * value_dim, (at + 1) * value_dim)


def _some_heads(ref, state, pack: int, kind: ScanKind, group: int, held, documents, raw) -> None:
    first = pack * kind.heads

    def held_at(name: str) -> int:
        return first * held[name] // group

    def of(name: str) -> jax.Array:
        width = ref[name].shape[2] // held[name]
        return ref[name][0, :, held_at(name) * width : (held_at(name) + kind.heads) * width]

    k, written, entered = of("k"), of("v"), state[pack]
    if kind.decay == "head":
        total = [ref["total"][0, head, 0] for head in range(first, first + kind.heads)]
    else:
        total = [] if kind.decay == "none" else [of("total")]
    weights = tpu_chunk.weights(kind, total, documents, written.shape[1] // kind.heads)
    lanes = pl.ds(pack * written.shape[1], written.shape[1])
    if "w" in ref:
        y = written.astype(jnp.float32) - tpu_chunk.from_state(of("w"), entered)
        if "y" in ref:
            ref["y"][0, :, lanes] = y.astype(ref["y"].dtype)
        written = y.astype(written.dtype)
    if "o" in ref:
        q = of("q")
        pair = held_at("q"), held_at("k")
        if kind.decay != "key" and pair not in raw:
            raw[pair] = tpu_chunk.products(kind, q, k)
        out = tpu_chunk.read(kind, weights, q, k, written, entered, raw.get(pair))
        ref["o"][0, :, lanes] = out.astype(ref["o"].dtype)
        if "dot_with" in ref:
            for at, dots in enumerate(tpu_chunk.row_sums(out * of("dot_with").astype(jnp.float32), kind.heads)):
                ref["dots"][0, first + at, 0] = tpu_chunk.as_row(dots)
    update = tpu_chunk.outer(kind, weights, k, y if "w" in ref else written)
    if "second_k" in ref:
        update = update + kind.scale * tpu_chunk.outer(kind, weights, of("second_k"), of("second_v"))
    state[pack] = update + (entered if weights.keep is None else weights.keep * entered)


def _cost(inputs, outputs, programs: int, kind: ScanKind, rows, key_dim: int, value_dim: int) -> pl.CostEstimate:
    c = kind.size
    levels = 1 + int(math.log2(max(c, BASE) // BASE)) if kind.decay in ("key", "value") else 1
    products = 2 * c * key_dim * value_dim * (1 + ("w" in rows) + ("second_k" in rows) + ("q" in rows))
    if "q" in rows:
        products += (
            2
            * c
            * c
            * (key_dim * (levels if kind.decay == "key" else 1) + value_dim * (levels if kind.decay == "value" else 1))
        )
    channels = {"none": 0, "head": c, "key": (levels + 3) * key_dim, "value": (levels + 3) * value_dim}[kind.decay]
    moved = sum(x.size * x.dtype.itemsize for _, x, _ in (*inputs, *outputs))
    return pl.CostEstimate(flops=programs * products, transcendentals=programs * c * channels, bytes_accessed=moved)


KERNELS = ScanKernels(scan, delta_scan, solve, solve_transposed, chunk_size, refuses)
