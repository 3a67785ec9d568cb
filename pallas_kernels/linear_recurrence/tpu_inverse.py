"""The delta rule's triangular systems (chunk_scan.Solve) as Mosaic TPU kernels: a program for each chunk and a few
heads, in any order.

A chunk's inverse is put together by `unit_inverse_by_ladder` in vector memory, fp32; it and what it is multiplied with
enter products as sums of two bf16 numbers where the arrays are bf16. Heads lie side by side in the lanes
(tpu_chunk.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_tpu
from recollect.pallas_kernels.linear_recurrence import tpu_blocks, tpu_chunk
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total, unit_inverse_by_ladder
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks, Solution
from recollect.pallas_kernels.linear_recurrence.tpu_chunk import ScanKind, Weights
from recollect.pallas_kernels.mosaic_tpu import product


def solve(e, k, v, chunks: Chunks, *, heads: int, strength=None, log_decay=None, keeps: bool = True) -> Solution:
    """See chunk_scan.Solve; the inverse is (b, heads, t / c, c, c), in bf16 where all arrays are.

    Raises:
      ValueError: as tpu.scan.
    """
    total = None
    if log_decay is not None:
        total = running_total(log_decay, chunks.size)
        chunks = dataclasses.replace(chunks, total=total)
    made = _launch({"e": e, "k": k, "v": v}, chunks, heads, 1.0, strength=strength, keeps=keeps)
    return Solution(made["w"], made["u"], made.get("new_inverse"), total)


def solve_transposed(inverse, q, k, do, chunks: Chunks, *, heads: int, scale: float = 1.0) -> Solution:
    """See chunk_scan.SolveTransposed.

    Raises:
      ValueError: as tpu.scan.
    """
    made = _launch({"q": q, "k": k, "do": do}, chunks, heads, float(scale), inverse=inverse)
    return Solution(made["w"], made["u"])


def _launch(
    rows: dict[str, jax.Array], chunks: Chunks, heads: int, scale: float, *, strength=None, inverse=None, keeps=False
) -> dict[str, jax.Array]:
    value = rows["do" if "do" in rows else "v"]
    b, t, _, value_dim = value.shape
    key_dim, c = rows["k"].shape[3], chunks.size
    compute = jnp.dtype(jnp.bfloat16) if all(x.dtype == jnp.bfloat16 for x in rows.values()) else jnp.dtype(jnp.float32)
    new_rows = {"w": (key_dim, compute), "u": (value_dim, compute)}
    layout = tpu_blocks.BlockLayout.of(rows, new_rows, chunks, heads, False)
    inputs = layout.inputs(chunks)
    if strength is not None:
        inputs.append(("strength", *layout.per_token(jnp.swapaxes(strength.astype(jnp.float32), 1, 2))))
    square = jax.ShapeDtypeStruct((b, heads, t // c, c, c), compute)
    squares = pl.BlockSpec((1, layout.groups.group, 1, c, c), lambda b, h, j: (b, h, j, 0, 0))
    if inverse is not None:
        inputs.append(("inverse", inverse, squares))
    outputs = [(name, *layout.new_rows(*like)) for name, like in new_rows.items()]
    if keeps:
        outputs.append(("new_inverse", square, squares))
    kind = ScanKind(c, chunks.decay, False, inverse is None, scale, layout.side_by_side(key_dim, value_dim))
    programs, levels = b * heads * (t // c), (c - 1).bit_length()
    results = mosaic_tpu.call(
        functools.partial(_kernel, kind=kind, layout=layout, key_dim=key_dim, value_dim=value_dim),
        inputs,
        outputs,
        grid=(b, heads // layout.groups.group, t // c),
        dimension_semantics=("parallel", "parallel", "parallel"),
        flops=programs * 2 * c * c * (2 * key_dim + value_dim + 2 * levels * c),
        transcendentals=programs * c * c,
        name="recurrence_solve" + ("" if inverse is None else "_transposed"),
    )
    return results | {name: layout.as_rows(results[name], d).astype(value.dtype) for name, (d, _) in new_rows.items()}


def _kernel(ref, *, kind: ScanKind, layout: tpu_blocks.BlockLayout, key_dim: int, value_dim: int) -> None:
    documents = tpu_blocks.documents(ref) if "segments" in ref else None
    for pack in range(layout.groups.group // kind.heads):
        first = pack * kind.heads
        heads = range(first, first + kind.heads)
        w, u = ((0, slice(None), pl.ds(first * size, kind.heads * size)) for size in (key_dim, value_dim))
        of = functools.partial(layout.heads_of, ref, first=first, count=kind.heads)
        weights = tpu_chunk.weights(kind, layout.totals(ref, first, kind), documents, key_dim)
        k = of("k")
        if "inverse" in ref:
            scores = _scores(kind, weights, of("q"), k)
            inverses = [ref["inverse"][0, head, 0].astype(jnp.float32) for head in heads]
            read = [
                kind.scale * _exact(matrix, inverse, k.dtype, 0)
                for matrix, inverse in zip(scores, inverses, strict=True)
            ]
            ref["w"][w] = _apply(inverses, tpu_chunk.times(k, weights.writes), kind, k.dtype, 1).astype(k.dtype)
            ref["u"][u] = _apply(read, of("do"), kind, k.dtype, 1).astype(k.dtype)
            continue
        e = of("e")
        inverses = [unit_inverse_by_ladder(lower) for lower in _scores(kind, weights, e, k)]
        ref["w"][w] = _apply(inverses, tpu_chunk.times(e, weights.reads), kind, k.dtype, 0).astype(k.dtype)
        if "new_inverse" in ref:
            for head, inverse in zip(heads, inverses, strict=True):
                ref["new_inverse"][0, head, 0] = inverse.astype(k.dtype)
        if "strength" in ref:
            inverses = [inverse * ref["strength"][0, head, 0] for head, inverse in zip(heads, inverses, strict=True)]
        ref["u"][u] = _apply(inverses, of("v"), kind, k.dtype, 0).astype(k.dtype)


def _scores(kind: ScanKind, weights: Weights, rows: jax.Array, k: jax.Array) -> list[jax.Array]:
    """Of each head (c, c) fp32: products of rows with k, masked, weighted by pairs."""
    if kind.decay != "key":
        raw = tpu_chunk.products(kind, rows, k)
        return [
            jnp.where(pairs, x, 0) if kind.decay == "none" else x * pairs
            for x, pairs in zip(raw, weights.pairs, strict=True)
        ]
    scores = [jnp.zeros((kind.size, kind.size), jnp.float32)] * kind.heads
    for level in weights.levels:
        raw = tpu_chunk.products(kind, (rows * level.row).astype(k.dtype), (k * level.column).astype(k.dtype))
        scores = [x + jnp.where(level.pairs, y, 0) for x, y in zip(scores, raw, strict=True)]
    if kind.strict:
        return scores
    # Levels leave j = i out.
    diagonal = lax.broadcasted_iota(jnp.int32, scores[0].shape, 0) == lax.broadcasted_iota(
        jnp.int32, scores[0].shape, 1
    )
    diagonals = tpu_chunk.row_sums(rows.astype(jnp.float32) * k.astype(jnp.float32), kind.heads)
    return [x + jnp.where(diagonal, products, 0) for x, products in zip(scores, diagonals, strict=True)]


def _apply(matrices: list[jax.Array], x: jax.Array, kind: ScanKind, dtype: Any, transposed: int) -> jax.Array:
    """Each head's (c, c) matrix, or its transpose, times that head's lanes of x."""
    return tpu_chunk.add_up(
        _exact(matrix, tpu_chunk.only(x, head, kind.heads), dtype, transposed) for head, matrix in enumerate(matrices)
    )


def _exact(a: jax.Array, b: jax.Array, dtype: Any, transposed: int) -> jax.Array:
    """a b or a^T b, fp32, of factors that are fp32, in products of dtype."""
    left, right = tpu_chunk.in_parts(a, dtype), tpu_chunk.in_parts(b, dtype)
    return tpu_chunk.add_up(
        product(x, y, 1 - transposed, 0) for i, x in enumerate(left) for j, y in enumerate(right) if i + j < 2
    )
