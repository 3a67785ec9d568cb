"""The long convolution for Hopper GPUs, in Mosaic GPU: products of bf16 blocks with Toeplitz matrices on the tensor
cores.

XLA writes the matrices, 64 x 64 for each channel and 64 lags: 128 bytes a lag and channel, written and read, against 2
bytes per row of the batch for each input. (Copies cannot build them from the filter: in swizzled shared memory they
start at multiples of a tile.) Convolving, a block of threads makes 128 rows of blocks of the output: it loads all
inputs they depend on once, then loops over the matrices, 8 KiB each for a product of 1 MFLOP. Correlating, it makes the
products of one lag of blocks, loops over the rows, 32 KiB each for 1 MFLOP, and XLA sums their diagonals (256 bytes a
lag and channel). Copies run ahead of the products, of which two are under way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import dispatch, mosaic_gpu
from recollect.pallas_kernels.gated_convolution import LONG_DIMENSIONS, long
from recollect.pallas_kernels.sharding import over_mesh

BLOCK = 64
BATCH = 8  # rows are shifted by multiples of the batch, and tiles of shared memory have 8 of them
ROWS = 128  # of a product
RESIDENT_ROWS = 1024  # 128 KiB of inputs, beside which matrices and results fit
AHEAD = 3


def refuses(x, filter, *, segment_ids=None, **settings: Any) -> dispatch.Refusal:
    """Returns why these kernels cannot serve a call; None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"its products take bfloat16; this is {x.dtype}"
    return long.refuses(x, filter, segment_ids=segment_ids) or mosaic_gpu.unavailable()


@functools.partial(over_mesh, arguments=LONG_DIMENSIONS, results="b t h")
def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: None = None, dtype: Any) -> jax.Array:
    """See recollect.pallas_kernels.gated_convolution.long.gated."""
    return long.by_blocks(long.Products(BLOCK, BATCH, _convolve, _correlate), dtype, x, filter)


def _convolve(x: jax.Array, windows: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    # What shared memory holds of a channel: all blocks of some rows of the batch.
    groups = -(-b // max(BATCH, RESIDENT_ROWS // n // BATCH * BATCH))
    batch = mosaic_gpu.round_up(-(-b // groups), BATCH)
    rows = n * batch
    count = -(-rows // ROWS)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, groups * batch - b), (0, 0)))
    x = jnp.moveaxis(x.reshape(d, n, groups, batch, c), 2, 1).reshape(d, groups, rows, c)
    # Zeros before the first block, so that every matrix meets whole products.
    inputs = jnp.pad(x, ((0, 0), (0, 0), (ROWS, count * ROWS - rows), (0, 0)))
    matrices = long.toeplitz(windows).astype(x.dtype)

    def body(inputs_ref, matrices_ref, y_ref, resident, matrix_tile, y_tile, arrived, arrived_inputs):
        channel, group, tile = (jax.lax.axis_index(name) for name in ("channel", "group", "tile"))
        first = tile * ROWS
        steps = jnp.minimum(jax.lax.div(first + ROWS - 1, batch) + 1, n)

        def fetch(chunk, _):
            part = pl.ds(pl.multiple_of(chunk * ROWS, ROWS), ROWS)
            source = inputs_ref.at[channel, group, part, :]
            mosaic_gpu.plgpu.copy_gmem_to_smem(source, resident.at[part], arrived_inputs.at[chunk])

        def wait(chunk, _):
            mosaic_gpu.plgpu.barrier_wait(arrived_inputs.at[chunk])

        jax.lax.fori_loop(0, tile + 2, fetch, None)

        def total(accumulator):
            def multiply(step, slot):
                shifted = pl.ds(pl.multiple_of(ROWS + first - step * batch, BATCH), ROWS)
                mosaic_gpu.plgpu.wgmma(accumulator, resident.at[shifted], matrix_tile.at[slot])

            def sources(step):
                return ((matrices_ref.at[channel, step], matrix_tile),)

            _pipeline(steps, sources, arrived, multiply, lambda: jax.lax.fori_loop(0, tile + 2, wait, None))
            return accumulator[...]

        y_tile[...] = pl.run_scoped(total, mosaic_gpu.plgpu.ACC((ROWS, c), jnp.float32))
        _give(y_tile, y_ref.at[channel, group, pl.ds(first, ROWS), :])

    (y,) = mosaic_gpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((d, groups, count * ROWS, c), jnp.float32)],
        scratch_types=[
            mosaic_gpu.tiled(((count + 1) * ROWS, c), x.dtype),
            mosaic_gpu.tiled((AHEAD, c, c), x.dtype),
            mosaic_gpu.tiled((ROWS, c), jnp.float32),
            mosaic_gpu.plgpu.Barrier(num_arrivals=1, num_barriers=AHEAD),
            mosaic_gpu.plgpu.Barrier(num_arrivals=1, num_barriers=count + 1),
        ],
        grid=(count, groups, d),
        grid_names=("tile", "group", "channel"),
        name="long_convolution",
    )(inputs, matrices)
    y = jnp.moveaxis(y[:, :, :rows].reshape(d, groups, n, batch, c), 1, 2)
    return y.reshape(d, n, groups * batch, c)[:, :, :b]


def _correlate(x: jax.Array, dy: jax.Array) -> jax.Array:
    d, n, b, c = x.shape
    total_rows = mosaic_gpu.round_up(n * b, ROWS)
    # A lag of blocks moves the rows of dy: its last product may reach ROWS further, into zeros.
    x, dy = (
        jnp.pad(part.reshape(d, n * b, c), ((0, 0), (0, total_rows + more - n * b), (0, 0)))
        for part, more in ((x, 0), (dy, ROWS))
    )

    def body(x_ref, dy_ref, products_ref, x_tile, dy_tile, products_tile, arrived):
        channel, lag = jax.lax.axis_index("channel"), jax.lax.axis_index("lag")
        steps = jax.lax.div((n - lag) * b + ROWS - 1, ROWS)

        def sources(step):
            shifted = pl.ds(pl.multiple_of(step * ROWS + lag * b, BATCH), ROWS)
            return (x_ref.at[channel, pl.ds(step * ROWS, ROWS), :], x_tile), (dy_ref.at[channel, shifted, :], dy_tile)

        def total(accumulator):
            def multiply(_, slot):
                mosaic_gpu.plgpu.wgmma(accumulator, mosaic_gpu.transposed(x_tile.at[slot]), dy_tile.at[slot])

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


def _pipeline(steps, sources, arrived, multiply, before=lambda: None) -> None:
    """multiply(step, slot) starts a product for each step, after the copies of `sources(step)`, pairs (from, to), which
    run ahead.

    before: called when the first copies are under way.
    """
    plgpu = mosaic_gpu.plgpu

    def fetch(step, slot):
        for source, target in sources(step):
            plgpu.copy_gmem_to_smem(source, target.at[slot], arrived.at[slot])

    jax.lax.fori_loop(0, jnp.minimum(steps, AHEAD), lambda step, _: fetch(step, step), None)
    before()

    def advance(step, _):
        slot = jax.lax.rem(step, AHEAD)
        plgpu.barrier_wait(arrived.at[slot])
        multiply(step, slot)
        plgpu.wgmma_wait(1)  # of the product before this one: what it read may be overwritten
        done = step - 1
        pl.when((done >= 0) & (done + AHEAD < steps))(lambda: fetch(done + AHEAD, jax.lax.rem(done + AHEAD, AHEAD)))

    jax.lax.fori_loop(0, steps, advance, None)
    plgpu.wgmma_wait(0)


def _give(tile: Any, target: Any) -> None:
    mosaic_gpu.plgpu.commit_smem()
    mosaic_gpu.plgpu.copy_smem_to_gmem(tile, target)
    mosaic_gpu.plgpu.wait_smem_to_gmem(0)
