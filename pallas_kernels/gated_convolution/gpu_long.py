"""The long convolution for Hopper GPUs, in Mosaic GPU: products of bf16 blocks with Toeplitz matrices on the tensor cores.

XLA writes the matrices, 64 x 64 for each channel and 64 lags: 128 bytes a lag and channel, written and read, against 2 bytes a row
of the batch for each input. (Copies cannot build them from the filter: in swizzled shared memory they start at multiples of a tile.)
Convolving, a block of threads makes 128 rows of blocks of the output, and loops over the matrices that reach them. Correlating, it
makes the products of one lag of blocks, loops over the rows, and XLA sums their diagonals (256 bytes a lag and channel). Copies run
a few steps ahead of the products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, mosaic_gpu
from pallas_kernels.gated_convolution import long

BLOCK = 64
BATCH = 8  # rows are shifted by multiples of the batch, and tiles of shared memory have 8 of them
ROWS = 128  # of a product
AHEAD = 3


def refuses(x, filter, *, segment_ids=None, **settings: Any) -> dispatch.Refusal:
    """Why these kernels cannot serve a call; None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"its products take bfloat16; this is {x.dtype}"
    return long.refuses(x, filter, segment_ids=segment_ids) or mosaic_gpu.unavailable()


def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: None = None, dtype: Any) -> jax.Array:
    """See pallas_kernels.gated_convolution.long.gated."""
    return long.by_blocks(long.Products(BLOCK, BATCH, _convolve, _correlate), dtype, x, filter)


def _convolve(x: jax.Array, windows: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    count = -(-n * b // ROWS)
    # Zeros before the first block, so that every matrix meets whole products.
    inputs = jnp.pad(x.reshape(d, n * b, c), ((0, 0), (ROWS, count * ROWS - n * b), (0, 0)))
    matrices = long.toeplitz(windows).astype(x.dtype)

    def body(inputs_ref, matrices_ref, y_ref, inputs_tile, matrix_tile, y_tile, arrived):
        channel, tile = jax.lax.axis_index("channel"), jax.lax.axis_index("tile")
        first = tile * ROWS
        steps = jnp.minimum(jax.lax.div(first + ROWS - 1, b) + 1, n)

        def sources(step):
            rows = pl.ds(pl.multiple_of(ROWS + first - step * b, BATCH), ROWS)
            return (inputs_ref.at[channel, rows, :], inputs_tile), (matrices_ref.at[channel, step], matrix_tile)

        def total(accumulator):
            _pipeline(steps, sources, arrived, lambda slot: _multiply(accumulator, inputs_tile.at[slot], matrix_tile.at[slot]))
            return accumulator[...]

        y_tile[...] = pl.run_scoped(total, mosaic_gpu.plgpu.ACC((ROWS, c), jnp.float32))
        _give(y_tile, y_ref.at[channel, pl.ds(first, ROWS), :])

    (y,) = mosaic_gpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((d, count * ROWS, c), jnp.float32)],
        scratch_types=[
            mosaic_gpu.tiled((AHEAD, ROWS, c), x.dtype),
            mosaic_gpu.tiled((AHEAD, c, c), x.dtype),
            mosaic_gpu.tiled((ROWS, c), jnp.float32),
            mosaic_gpu.plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
        ],
        grid=(count, d),
        grid_names=("tile", "channel"),
        name="long_convolution",
    )(inputs, matrices)
    return y[:, : n * b].reshape(d, n, b, c)


def _correlate(x: jax.Array, dy: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    total_rows = mosaic_gpu.round_up(n * b, ROWS)
    # A lag of blocks moves the rows of dy: its last product may reach ROWS further, into zeros.
    x, dy = (jnp.pad(part.reshape(d, n * b, c), ((0, 0), (0, total_rows + more - n * b), (0, 0))) for part, more in ((x, 0), (dy, ROWS)))

    def body(x_ref, dy_ref, products_ref, x_tile, dy_tile, products_tile, arrived):
        channel, lag = jax.lax.axis_index("channel"), jax.lax.axis_index("lag")
        steps = jax.lax.div((n - lag) * b + ROWS - 1, ROWS)

        def sources(step):
            shifted = pl.ds(pl.multiple_of(step * ROWS + lag * b, BATCH), ROWS)
            return (x_ref.at[channel, pl.ds(step * ROWS, ROWS), :], x_tile), (dy_ref.at[channel, shifted, :], dy_tile)

        def total(accumulator):
            def multiply(slot):
                _multiply(accumulator, mosaic_gpu.transposed(x_tile.at[slot]), dy_tile.at[slot])

            _pipeline(steps, sources, arrived, multiply)
            return accumulator[...]

        products_tile[...] = pl.run_scoped(total, mosaic_gpu.plgpu.ACC((c, c), jnp.float32))
        _give(products_tile, products_ref.at[channel, lag])

    (products,) = mosaic_gpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((d, n, c, c), jnp.float32)],
        scratch_types=[
            mosaic_gpu.tiled((AHEAD, ROWS, c), x.dtype),
            mosaic_gpu.tiled((AHEAD, ROWS, c), x.dtype),
            mosaic_gpu.tiled((c, c), jnp.float32),
            mosaic_gpu.plgpu.Barrier(num_arrivals=2, num_barriers=AHEAD),
        ],
        grid=(n, d),
        grid_names=("lag", "channel"),
        name="long_convolution_filter_gradient",
    )(x, dy)
    return long.diagonal_sums(products)


def _pipeline(steps, sources, arrived, multiply) -> None:
    """multiply(slot) for each step, after the copies of `sources(step)`, pairs (from, to): they run AHEAD steps ahead."""
    plgpu = mosaic_gpu.plgpu

    def fetch(step, slot):
        for source, target in sources(step):
            plgpu.copy_gmem_to_smem(source, target.at[slot], arrived.at[slot])

    jax.lax.fori_loop(0, jnp.minimum(steps, AHEAD), lambda step, _: fetch(step, step), None)

    def advance(step, _):
        slot = jax.lax.rem(step, AHEAD)
        plgpu.barrier_wait(arrived.at[slot])
        multiply(slot)

        pl.when(step + AHEAD < steps)(lambda: fetch(step + AHEAD, slot))

    jax.lax.fori_loop(0, steps, advance, None)


def _multiply(accumulator: Any, left: Any, right: Any) -> None:
    mosaic_gpu.plgpu.wgmma(accumulator, left, right)
    mosaic_gpu.plgpu.wgmma_wait(0)  # the next copy overwrites what it reads


def _give(tile: Any, target: Any) -> None:
    mosaic_gpu.plgpu.commit_smem()
    mosaic_gpu.plgpu.copy_smem_to_gmem(tile, target)
    mosaic_gpu.plgpu.wait_smem_to_gmem(0)
