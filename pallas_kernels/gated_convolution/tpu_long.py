"""The long convolution for TPUs: products with Toeplitz matrices that are built in VMEM, a channel a program.

A matrix is a window of the filter, one copy a row, each turned by one more: a strided rotation. For each channel all of
them are built once; then rows of blocks are multiplied, some 256 at a time, by every matrix that reaches them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.gated_convolution import LONG_DIMENSIONS, long
from recollect.pallas_kernels.sharding import over_mesh

BLOCK = 128
BATCH = 16  # a tile of bf16 rows
BATCH_AT_ONCE = 64
ROWS = 256  # of a product


def refuses(x, filter, *, segment_ids=None, **settings: Any) -> dispatch.Refusal:
    """Why these kernels cannot serve a call; None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32; this is {x.dtype}"
    return long.refuses(x, filter, segment_ids=segment_ids)


@functools.partial(over_mesh, arguments=LONG_DIMENSIONS, results="b t h")
def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: None = None, dtype: Any) -> jax.Array:
    """See recollect.pallas_kernels.gated_convolution.long.gated."""
    return long.by_blocks(long.Products(BLOCK, BATCH, _convolve, _correlate), dtype, x, filter)


def _convolve(x: jax.Array, windows: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    batch, together = _sizes(n, b)
    n = -(-n // together) * together
    x = jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)))
    windows = jnp.pad(windows, ((0, 0), (0, n - windows.shape[1]), (0, 0)))
    rows = together * batch

    def kernel(x_ref, windows_ref, y_ref, matrices, inputs):
        @pl.when(pl.program_id(1) == 0)
        def _():
            def build(r, _):
                window = jnp.broadcast_to(windows_ref[0, pl.ds(r, 1)], (c, 2 * c))
                matrices[r] = turned(window)[:, :c].astype(matrices.dtype)

            jax.lax.fori_loop(0, n, build, None)

        inputs[:rows] = jnp.zeros((rows, c), inputs.dtype)
        inputs[rows:] = x_ref[0].reshape(n * batch, c)
        for first in range(0, n, together):

            def add(r, total, first=first):
                start = pl.multiple_of((first + together - r) * batch, batch)
                return total + _dot(inputs[pl.ds(start, rows)], matrices[r], 1)

            total = jax.lax.fori_loop(0, first + together, add, jnp.zeros((rows, c), jnp.float32))
            y_ref[0, first : first + together] = total.reshape(together, batch, c)

    y = pl.pallas_call(
        kernel,
        grid=(d, b // batch),
        in_specs=[
            pl.BlockSpec((1, n, batch, c), lambda d, b: (d, 0, b, 0)),
            pl.BlockSpec((1, n, 2 * c), lambda d, b: (d, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, n, batch, c), lambda d, b: (d, 0, b, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((n, c, c), x.dtype), pltpu.VMEM((rows + n * batch, c), x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, 4),
        interpret=_interpret(),
        name="long_convolution",
    )(x, windows)
    return y


def _correlate(x: jax.Array, dy: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    batch, together = _sizes(n, b)
    n = -(-n // together) * together
    x, dy = (jnp.pad(part, ((0, 0), (0, n - part.shape[1]), (0, 0), (0, 0))) for part in (x, dy))
    rows = together * batch

    def kernel(x_ref, dy_ref, sums_ref, products, inputs):
        @pl.when(pl.program_id(1) == 0)
        def _():
            products[...] = jnp.zeros((n, c, c), jnp.float32)

        inputs[:rows] = jnp.zeros((rows, c), inputs.dtype)
        inputs[rows:] = x_ref[0].reshape(n * batch, c)
        for first in range(0, n, together):
            gradients = dy_ref[0, first : first + together].reshape(rows, c)

            def add(r, _, first=first, gradients=gradients):
                start = pl.multiple_of((first + together - r) * batch, batch)
                products[r] += _dot(inputs[pl.ds(start, rows)], gradients, 0)

            jax.lax.fori_loop(0, first + together, add, None)

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _():
            def along_diagonals(r, _):
                wide = jnp.concatenate([products[r], jnp.zeros((c, c), jnp.float32)], axis=1)
                sums_ref[0, pl.ds(r, 1)] = jnp.sum(turned(wide), axis=0, keepdims=True)

            jax.lax.fori_loop(0, n, along_diagonals, None)

    blocks = pl.BlockSpec((1, n, batch, c), lambda d, b: (d, 0, b, 0))
    return pl.pallas_call(
        kernel,
        grid=(d, b // batch),
        in_specs=[blocks, blocks],
        out_specs=pl.BlockSpec((1, n, 2 * c), lambda d, b: (d, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((d, n, 2 * c), jnp.float32),
        scratch_shapes=[pltpu.VMEM((n, c, c), jnp.float32), pltpu.VMEM((rows + n * batch, c), x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, x.dtype.itemsize),
        interpret=_interpret(),
        name="long_convolution_filter_gradient",
    )(x, dy)


def turned(rows: jax.Array) -> jax.Array:
    """Row j of (c, 2 c) turned to the right by j."""
    if dispatch.interpretation() is None:
        return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)
    # Simulated, a strided rotation is one operation a row, which takes seconds to compile: turn by powers of 2 instead.
    row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    for bit in range(rows.shape[0].bit_length() - 1):
        rows = jnp.where((row >> bit) & 1 == 1, jnp.roll(rows, 1 << bit, axis=1), rows)
    return rows


def _sizes(n: int, b: int) -> tuple[int, int]:
    """Rows of the batch a program, a divisor of b; and blocks a product, for some ROWS rows."""
    batch = next(size for size in range(min(b, BATCH_AT_ONCE), 0, -BATCH) if b % size == 0)
    return batch, min(n, max(1, ROWS // batch))


def _dot(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    precision = "highest" if left.dtype == jnp.float32 else None
    axes = (((contracted,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _cost(x: jax.Array, result_bytes: int) -> pl.CostEstimate:
    _, n, _, c = x.shape
    return pl.CostEstimate(
        flops=x.size * n * c, transcendentals=0, bytes_accessed=x.size * (x.dtype.itemsize + result_bytes)
    )


def _interpret() -> Any:
    how = dispatch.interpretation()
    return pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values"
