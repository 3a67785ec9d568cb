"""The delta rule's triangular systems (chunk_scan.Solve) as Mosaic TPU kernels: a program for each chunk and a few heads, in
any order.

A chunk's inverse is put together by `unit_inverse_by_ladder` in vector memory, fp32; it and what it is multiplied with
enter products as sums of two bf16 numbers where the arrays are bf16. Heads lie side by side in the lanes, as
tpu_chunk.py says.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.linear_recurrence import tpu_blocks, tpu_chunk
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total, unit_inverse_by_ladder
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, Solution
from recollect.pallas_kernels.linear_recurrence.tpu_chunk import ScanKind, Weights


def solve(e, k, v, chunks: Chunks, *, heads: int, strength=None, log_decay=None, keeps: bool = True) -> Solution:
    """See chunk_scan.Solve; the inverse is (b, heads, t / c, c, c), in bf16 where all arrays are.

    Raises:
      ValueError: as tpu.scan.
    """
    total = None
    if log_decay is not None:
        total = running_total(log_decay, chunks.size)
        chunks = dataclasses.replace(chunks, total=total)
    made = _launch({"e": e, "k": k, "v": v}, chunks, heads, v.shape[3], 1.0, strength=strength, keeps=keeps)
    return Solution(made["w"], made["u"], made.get("inverse"), total)


def solve_transposed(inverse, q, k, do, chunks: Chunks, *, heads: int, scale: float = 1.0) -> Solution:
    """See chunk_scan.SolveTransposed.

    Raises:
      ValueError: as tpu.scan.
    """
    made = _launch({"q": q, "k": k, "do": do}, chunks, heads, do.shape[3], scale, inverse=inverse)
    return Solution(made["w"], made["u"])


def _launch(
    rows: dict[str, jax.Array],
    chunks: Chunks,
    heads: int,
    value_dim: int,
    scale: float,
    *,
    strength=None,
    inverse=None,
    keeps=False,
):
    value = rows["do" if inverse is not None else "v"]
    b, t = value.shape[:2]
    key_dim, c = rows["k"].shape[3], chunks.size
    tpu_blocks.check(rows | {"v": value}, chunks, heads)
    compute = jnp.dtype(jnp.bfloat16) if all(x.dtype == jnp.bfloat16 for x in rows.values()) else jnp.dtype(jnp.float32)
    given = {name: x.astype(compute) for name, x in rows.items()}
    if chunks.decay == "key":
        assert chunks.total is not None
        given["total"] = chunks.total
    like = {
        "w": jax.ShapeDtypeStruct((b, t, heads, key_dim), compute),
        "u": jax.ShapeDtypeStruct((b, t, heads, value_dim), compute),
    }
    plan = tpu_blocks.plan_heads(given | like, {}, heads, key_dim, value_dim, c)
    placed = tpu_blocks.BlockLayout(plan, b, t // c, c, False)
    inputs = [(name, *placed.rows(x)) for name, x in given.items()]
    inputs += placed.weights(chunks)
    if strength is not None:
        inputs.append(("strength", *placed.a_token(jnp.swapaxes(strength.astype(jnp.float32), 1, 2))))
    square = jax.ShapeDtypeStruct((b, heads, t // c, c, c), compute)
    squares = pl.BlockSpec((1, plan.group, 1, c, c), lambda b, h, j: (b, h, j, 0, 0))
    if inverse is not None:
        inputs.append(("inverse", inverse, squares))
    outputs = [(name, *placed.new_rows(x.shape[3], compute)) for name, x in like.items()]
    if keeps:
        outputs.append(("inverse", square, squares))
    held = {name: plan.held(x.shape[2]) for name, x in given.items()}
    together = tpu_blocks.side_by_side(plan.group, held.values(), key_dim, value_dim)
    kind = ScanKind(c, chunks.decay, False, inverse is None, float(scale), together)
    sizes = key_dim, value_dim
    how = dispatch.interpretation()
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            names=([x[0] for x in inputs], [x[0] for x in outputs]),
            kind=kind,
            group=plan.group,
            held=held,
            sizes=sizes,
        ),
        grid=(b, heads // plan.group, t // c),
        in_specs=[spec for *_, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[shape for _, shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        cost_estimate=_cost(inputs, outputs, b * heads * (t // c), c, key_dim, value_dim),
        interpret=pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values",
        name="recurrence_solve" + ("" if inverse is None else "_transposed"),
    )(*(x for _, x, _ in inputs))
    made = dict(zip((name for name, *_ in outputs), found, strict=True))
    return made | {name: placed.as_rows(made[name], x.shape[3]).astype(value.dtype) for name, x in like.items()}


def _kernel(*refs, names, kind: ScanKind, group: int, held: dict[str, int], sizes: tuple[int, int]) -> None:
    given, made = names
    ref = dict(zip(given, refs[: len(given)], strict=True))
    target = dict(zip(made, refs[len(given) :], strict=True))
    documents = tpu_blocks.documents(ref) if "segments" in ref else None
    for pack in range(group // kind.heads):
        first = pack * kind.heads
        key_lanes, value_lanes = (pl.ds(first * size, kind.heads * size) for size in sizes)

        def of(name: str, first: int = first) -> jax.Array:
            width = ref[name].shape[2] // held[name]
            at = first * held[name] // group
            return ref[name][0, :, at * width : (at + kind.heads) * width]

        own = range(first, first + kind.heads)
        total = (
            [ref["total"][0, head, 0] for head in own]
            if kind.decay == "head"
            else [of("total")]
            if kind.decay == "key"
            else []
        )
        weights = tpu_chunk.weights(kind, total, documents, sizes[0])
        k = of("k")
        if "inverse" in ref:
            do, scores = of("do"), _scores(kind, weights, of("q"), k)
            inverses = [ref["inverse"][0, head, 0].astype(jnp.float32) for head in own]
            read = [
                kind.scale * _exact(product, inverse, k.dtype, 0)
                for product, inverse in zip(scores, inverses, strict=True)
            ]
            target["w"][0, :, key_lanes] = _apply(inverses, _times(k, weights.writes), kind, k.dtype, 1).astype(k.dtype)
            target["u"][0, :, value_lanes] = _apply(read, do, kind, k.dtype, 1).astype(k.dtype)
            continue
        e = of("e")
        inverses = [unit_inverse_by_ladder(lower) for lower in _scores(kind, weights, e, k)]
        target["w"][0, :, key_lanes] = _apply(inverses, _times(e, weights.reads), kind, k.dtype, 0).astype(k.dtype)
        if "inverse" in target:
            for head, inverse in zip(own, inverses, strict=True):
                target["inverse"][0, head, 0] = inverse.astype(k.dtype)
        if "strength" in ref:
            inverses = [inverse * ref["strength"][0, head, 0] for head, inverse in zip(own, inverses, strict=True)]
        target["u"][0, :, value_lanes] = _apply(inverses, of("v"), kind, k.dtype, 0).astype(k.dtype)


def _scores(kind: ScanKind, weights: Weights, rows: jax.Array, k: jax.Array) -> list[jax.Array]:
    """Of each head (c, c) fp32: products of rows with k, masked, weighted by pairs."""
    if kind.decay != "key":
        raw = tpu_chunk.products(kind, rows, k)
        return [
            jnp.where(pairs, x, 0) if kind.decay == "none" else x * pairs
            for x, pairs in zip(raw, weights.pairs, strict=True)
        ]
    found = [jnp.zeros((kind.size, kind.size), jnp.float32)] * kind.heads
    for level in weights.levels:
        raw = tpu_chunk.products(kind, (rows * level.row).astype(k.dtype), (k * level.column).astype(k.dtype))
        found = [x + jnp.where(level.pairs, product, 0) for x, product in zip(found, raw, strict=True)]
    if kind.strict:
        return found
    # Levels leave j = i out.
    diagonal = lax.broadcasted_iota(jnp.int32, found[0].shape, 0) == lax.broadcasted_iota(jnp.int32, found[0].shape, 1)
    own = tpu_chunk.row_sums(rows.astype(jnp.float32) * k.astype(jnp.float32), kind.heads)
    return [x + jnp.where(diagonal, products, 0) for x, products in zip(found, own, strict=True)]


def _apply(matrices: list[jax.Array], x: jax.Array, kind: ScanKind, dtype: Any, transposed: int) -> jax.Array:
    """Each head's (c, c) matrix, or its transpose, times that head's lanes of x."""
    parts = [
        _exact(matrix, tpu_chunk.only(x, head, kind.heads), dtype, transposed) for head, matrix in enumerate(matrices)
    ]
    return functools.reduce(lambda a, b: a + b, parts)


def _exact(a: jax.Array, b: jax.Array, dtype: Any, transposed: int) -> jax.Array:
    """a b or a^T b, fp32, of factors that are fp32, in products of dtype."""
    left, right = tpu_chunk.in_parts(a, dtype), tpu_chunk.in_parts(b, dtype)
    products = [
        tpu_chunk.product(x, y, 1 - transposed, 0) for i, x in enumerate(left) for j, y in enumerate(right) if i + j < 2
    ]
    return functools.reduce(lambda x, y: x + y, products)


def _times(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else x.astype(jnp.float32) * weights


def _cost(inputs, outputs, programs: int, c: int, key_dim: int, value_dim: int) -> pl.CostEstimate:
    levels = (c - 1).bit_length()
    products = 2 * c * c * (2 * key_dim + value_dim + 2 * levels * c)
    moved = sum(x.size * x.dtype.itemsize for _, x, _ in (*inputs, *outputs))
    return pl.CostEstimate(flops=programs * products, transcendentals=programs * c * c, bytes_accessed=moved)
