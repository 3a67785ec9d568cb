"""Primitives of Mosaic GPU kernels (Pallas for NVIDIA Hopper), in one place for what differs between jax versions and
for what the simulator lacks.

`plgpu` is jax.experimental.pallas.mosaic_gpu, or None where it cannot be imported (it needs absl-py, which jax does not
declare); `unavailable()` says why. Kernels start by `kernel(...)`, load by `load`, transpose a reference by
`transposed`, multiply by `mm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import dispatch

plgpu: Any = None  # Any: what it holds, and with which arguments, differs between the jax versions served
_import_error: str | None = None
try:
    from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
except ImportError as error:  # pragma: no cover
    _import_error = str(error)
else:
    plgpu = _mosaic_gpu

SWIZZLE_BYTES = 128  # the widest, and with it the fewest tiles
ROWS = 64  # of a product: what one warpgroup's tensor core instruction takes
SHARED_MEMORY_BYTES = 227 * 1024  # of one block on Hopper

_REFERENCES_CARRY_INDICES = jax.version.__version_info__ >= (0, 11)


def unavailable() -> str | None:
    """Returns why no Mosaic GPU kernel can be traced, or be trusted, with what is installed; None if it can."""
    if plgpu is None:
        return f"jax.experimental.pallas.mosaic_gpu cannot be imported ({_import_error}); it needs absl-py"
    if dispatch.interpretation() is None:
        return _miscompiled_masks()
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"Mosaic GPU kernels are simulated from jax 0.11 on; this is {jax.__version__}"
    return None


def _miscompiled_masks() -> str | None:
    """Returns why this ptxas cannot be trusted; jax's attention kernel refuses the same versions for causal masks."""
    from jax._src.lib import cuda_versions

    try:
        version = None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except RuntimeError:  # the plugin without CUDA's libraries: compiling ahead of time
        return None
    if version is not None and 12080 <= version < 12091:
        return (
            f"ptxas of CUDA 12.8.0 to 12.9.0 miscompiles masks; this is CUDA {version // 1000}.{version % 1000 // 10}"
        )
    return None


def kernel(
    body: Callable[..., None],
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch_types: Sequence[Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    name: str,
    threads: int | None = None,
    approximate: bool = True,
) -> Callable[..., Sequence[jax.Array]]:
    """Returns a launch of `body(*inputs, *outputs, *scratch)`, simulated inside `dispatch.interpreted`.

    Args:
      grid, grid_names: thread blocks; the first axis varies fastest. Indices are jax.lax.axis_index(name).
      threads: warpgroups a block, whose index is axis_index("warpgroup"); None is one, without a name.
      approximate: exp and division by the hardware's approximations (relative error about 2^-22).
    """
    # Lane semantics: under the other kind jax 0.11's layout inference does not end on kernels that broadcast along rows
    # and columns.
    parameters = plgpu.CompilerParams(approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Lane)
    how = dispatch.interpretation()
    interpret = None if how is None else plgpu.InterpretGPUParams(detect_races=how == "races")
    body.__name__ = name
    warpgroups = {} if threads is None else {"num_threads": threads, "thread_name": "warpgroup"}
    return plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=list(scratch_types),
        compiler_params=parameters,
        grid=grid,
        grid_names=grid_names,
        interpret=interpret,
        **warpgroups,
    )


def tiled(shape: Sequence[int], dtype: jax.typing.DTypeLike, swizzle: int = SWIZZLE_BYTES) -> Any:
    """Shared memory for matrices that products read or registers of a product are stored to: the last two axes in
    swizzled tiles.

    swizzle: bytes, 128, 64 or 32; the columns must fill them, and both operands of a product must have the same.
    """
    across = swizzle // jnp.dtype(dtype).itemsize
    if shape[-1] % across or shape[-2] % 8:
        raise ValueError(
            f"tiled shared memory of {jnp.dtype(dtype)} needs sizes divisible by (8, {across}); got {tuple(shape)}"
        )
    return plgpu.SMEM(
        tuple(shape), dtype, transforms=(plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(swizzle))
    )


def plain(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory in row-major order: vectors, scalars."""
    return plgpu.SMEM(tuple(shape), dtype)


def load(ref: Any, layout: Any = None, optimized: bool = True) -> jax.Array:
    """Loads a whole reference (index it with .at first) into registers; by default in the layout that products take and
    give.

    optimized=False allows what is slow: matrices from `plain` shared memory or straight from device memory.
    """
    layout = plgpu.Layout.WGMMA if layout is None else layout
    index = () if _REFERENCES_CARRY_INDICES else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def load_per_row(ref: Any) -> jax.Array:
    """Loads a vector with an entry for each row of a product's result; see `along_columns`."""
    return load(ref, plgpu.Layout.WGMMA.reduce(1))


def load_per_column(ref: Any) -> jax.Array:
    """Loads a vector with an entry for each column of a product's result; see `along_rows`."""
    return load(ref, plgpu.Layout.WGMMA.reduce(0))


def along_columns(per_row: jax.Array, columns: int) -> jax.Array:
    """Broadcasts (m,) to (m, columns): an entry for each row, the same in all its columns."""
    return jax.lax.broadcast_in_dim(per_row, (per_row.shape[0], columns), (0,))


def along_rows(per_column: jax.Array, rows: int) -> jax.Array:
    """Broadcasts (n,) to (rows, n): an entry for each column, the same in all its rows."""
    return jax.lax.broadcast_in_dim(per_column, (rows, per_column.shape[0]), (1,))


def row_and_column(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Returns the int32 index of the row, and of the column, at each place of a product's result."""
    rows, columns = shape
    # A row's index that the compiler cannot see through keeps masks made of it inside their loop; lifted out, they fill
    # registers.
    row = jax.lax.optimization_barrier(_row_index(rows))
    return along_columns(row, columns), along_rows(_column_index(columns), rows)


def block_of_row(shape: tuple[int, int]) -> jax.Array:
    """Returns the int32 index of the row's block of 16, at each place of a product's result: the same in all threads of
    a warp."""
    return along_columns(_row_index(shape[0]) >> 4, shape[1])


def block_of_column(shape: tuple[int, int]) -> jax.Array:
    """Returns the int32 index of the column's block of 16, at each place of a product's result."""
    return along_rows(_column_index(shape[1]) >> 4, shape[0])


def _row_index(rows: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def _column_index(columns: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=plgpu.Layout.WGMMA.reduce(0))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """Returns an fp32 matrix in the layout of a product's result."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)


def per_row(x: jax.Array) -> jax.Array:
    """Returns a vector of one number, (m,), as `load_per_row` gives them."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def per_column(x: jax.Array) -> jax.Array:
    """Returns a vector of one number, (n,), as `load_per_column` gives them."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))


def transposed(ref: Any) -> Any:
    """Returns a matrix in `tiled` shared memory as its transpose, for a product; nothing moves. bf16 and fp16 only."""
    return ref.transpose((1, 0)) if _REFERENCES_CARRY_INDICES else plgpu.transpose_ref(ref, (1, 0))


def mm(
    a: Any, b: Any, acc: jax.Array | None = None, *more: tuple[Any, Any], meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """Returns acc + a @ b (+ the products of `more`), fp32, waited for.

    Args:
      a: (m, k) and b: (k, n), references to `tiled` shared memory, maybe `transposed`; m divisible by 64, n by 8, k by
        16. Values stored there from registers must have been committed (plgpu.commit_smem) first.
      acc: (m, n) fp32 in registers, or None for 0.
      meanwhile: called while the products run.
    """
    shape = (a.shape[0], b.shape[1])

    def products(accumulator: Any) -> None:
        for left, right in ((a, b), *more):
            plgpu.wgmma(accumulator, left, right)
        meanwhile()

    def from_zero(accumulator: Any) -> jax.Array:
        products(accumulator)
        return accumulator[...]

    if acc is None:
        return pl.run_scoped(from_zero, plgpu.ACC(shape, jnp.float32))
    if dispatch.interpretation() is not None:  # the simulator cannot start an accumulator from a value
        return acc + pl.run_scoped(from_zero, plgpu.ACC(shape, jnp.float32))
    return pl.run_state(products)(plgpu.ACC.init(acc))


def mm_while(first: tuple[Any, Any], second: tuple[Any, Any], use: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
    """Returns use(product of `first`), which runs while `second` is still being multiplied, and the product of
    `second`.

    Operands as in `mm`. use may write to shared memory that neither product reads.
    """

    def run(accumulator: Any, other: Any) -> tuple[Any, jax.Array]:
        plgpu.wgmma(accumulator, *first)
        plgpu.wgmma(other, *second)
        used = use(plgpu.wgmma_accumulator_load(accumulator, wait_n=1))
        return used, other[...]

    return pl.run_scoped(run, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in (first, second)))


def mm_registers(
    a: jax.Array, b: Any, acc: jax.Array, place: Any = None, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """Returns acc + a @ b, fp32, with a (m, k) bf16 in registers, in the layout of a product's result, and b in `tiled`
    shared memory.

    Args:
      place: (m, k) `tiled` shared memory, which the simulator stages `a` in; else unused.
      meanwhile: called while the product runs; it may not touch b.
    """
    if dispatch.interpretation() is not None:  # the simulator's products take both operands from shared memory
        place[...] = a
        plgpu.commit_smem()
        meanwhile()
        return mm(place, b, acc)

    def products(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, a, b)
        meanwhile()

    return pl.run_state(products)(plgpu.ACC.init(acc))


def mm_beside(
    a: Any,
    b: Any,
    acc: jax.Array,
    other: tuple[Any, Any],
    place: Any = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[jax.Array, jax.Array]:
    """Returns acc + a @ b, and the product of `other`, two references; waited for at once.

    Args:
      a, b: as `mm` takes them, or where `place` is given as `mm_registers` does.
      meanwhile: called while the products run.
    """
    if dispatch.interpretation() is not None:
        acc = mm(a, b, acc) if place is None else mm_registers(a, b, acc, place)
        meanwhile()
        return acc, mm(*other)

    def products(accumulators: Any) -> None:
        first, second = accumulators
        plgpu.wgmma(second, *other)
        plgpu.wgmma(first, a, b)
        meanwhile()

    zeros = filled((other[0].shape[0], other[1].shape[1]), 0.0)
    return pl.run_state(products)((plgpu.ACC.init(acc), plgpu.ACC.init(zeros)))


def round_up(size: int, to: int) -> int:
    """Returns the smallest multiple of `to` that is at least `size`."""
    return -(-size // to) * to


def pad_last(x: jax.Array, size: int) -> jax.Array:
    """Returns x with zeros appended on its last axis up to `size`."""
    missing = size - x.shape[-1]
    return x if missing == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def shared_bytes(shapes: Sequence[tuple[Sequence[int], jax.typing.DTypeLike]]) -> int:
    """Returns the bytes of shared memory that arrays of these shapes and dtypes take, each from a multiple of 1,024
    bytes on."""
    return sum(round_up(math.prod(shape) * jnp.dtype(dtype).itemsize, 1024) for shape, dtype in shapes)
