"""How arrays are cut into blocks for the TPU kernels, and how a walk over them is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.scheduled_attention.block_schedule import Fields
from recollect.pallas_kernels.scheduled_attention.tpu_grid import VisitList, resident_tile, visited_tile

LANES = 128
SCALAR_BYTES = 2**20 - 2**16
"""Of the 1 MiB of scalar memory that each generation has (libtpu says so of v5e, v5p and v6e), what lists of visits
may take."""

Where = Callable[..., tuple[Any, Any, Any]]
"""From a grid position and the scalars in memory: a block's sequence, head and tile."""


@dataclasses.dataclass(frozen=True)
class BlockedArray:
    """An array, or the shape of one to be made, and its blocks."""

    array: Any
    spec: pl.BlockSpec


def rows_shape(b: int, t: int, h: int, d: int) -> tuple[int, int, int]:
    """How heads' rows (b, t, h, d) lie in memory: as they are, (b, t, h d), where one head is whole lanes or all, else
    (b h, t, d).

    BlockSoftmax need lanes in multiples of 128 or all there are: narrower heads are transposed to be on their own.
    """
    return (b, t, h * d) if _flat(h, d) else (b * h, t, d)


def _flat(h: int, d: int) -> bool:
    return h == 1 or d % LANES == 0


def rows(x: jax.Array, tile: int, where: Where) -> BlockedArray:
    """(b, t, h, d) in blocks of one head's (1, tile, d)."""
    b, t, h, d = x.shape
    laid = x.reshape(b, t, h * d) if _flat(h, d) else jnp.swapaxes(x, 1, 2).reshape(b * h, t, d)
    return BlockedArray(laid, _rows_spec(h, d, tile, where))


def new_rows(shape: tuple[int, ...], dtype: Any, tile: int, where: Where) -> BlockedArray:
    """As `rows`, of an output: its shape (b, t, h, d) and dtype."""
    b, t, h, d = shape
    return BlockedArray(jax.ShapeDtypeStruct(rows_shape(b, t, h, d), dtype), _rows_spec(h, d, tile, where))


def as_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(b, t, h, d) of what was made as `new_rows`."""
    b, t, h, d = shape
    return x.reshape(shape) if _flat(h, d) else jnp.swapaxes(x.reshape(b, h, t, d), 1, 2)


def _rows_spec(h: int, d: int, tile: int, where: Where) -> pl.BlockSpec:
    def index(*at: Any) -> tuple[Any, Any, Any]:
        sequence, head, number = where(*at)
        return (sequence, number, head) if _flat(h, d) else (sequence * h + head, number, 0)

    return pl.BlockSpec((1, tile, d), index)


def a_query(x: jax.Array, tile: int, where: Where) -> BlockedArray:
    """Numbers a query, (b, h, t), in rows (1, 1, 1, 1, tile)."""
    b, h, t = x.shape
    return BlockedArray(x.reshape(b, h, t // tile, 1, tile), _a_query_spec(tile, where))


def new_a_query(b: int, h: int, t: int, tile: int, where: Where) -> BlockedArray:
    """As `a_query`, of an fp32 output."""
    return BlockedArray(jax.ShapeDtypeStruct((b, h, t // tile, 1, tile), jnp.float32), _a_query_spec(tile, where))


def _a_query_spec(tile: int, where: Where) -> pl.BlockSpec:
    def index(*at: Any) -> tuple[Any, ...]:
        sequence, head, number = where(*at)
        return sequence, head, number, 0, 0

    return pl.BlockSpec((1, 1, 1, 1, tile), index)


def fields(given: Fields, names: Sequence[str], tile: int, where: Where) -> BlockedArray:
    """Token fields (b or 1, t) together, in blocks (1, 1, fields, tile): one transfer for all of them."""
    xp = np if all(isinstance(x, np.ndarray) for x in given.values()) else jnp
    sequences, t = np.broadcast_shapes(*(given[name].shape for name in names))
    stacked = xp.stack([xp.broadcast_to(given[name], (sequences, t)) for name in names], axis=1).astype(xp.int32)
    tiles = jnp.asarray(xp.swapaxes(stacked.reshape(sequences, len(names), t // tile, tile), 1, 2))

    def index(*at: Any) -> tuple[Any, ...]:
        sequence, _, number = where(*at)
        return sequence if sequences > 1 else 0, number, 0, 0

    return BlockedArray(tiles, pl.BlockSpec((1, 1, len(names), tile), index))


def scalars(x: jax.Array) -> BlockedArray:
    """An array in scalar memory, whole."""
    return BlockedArray(x, pl.BlockSpec(memory_space=pltpu.SMEM))


@dataclasses.dataclass(frozen=True)
class TpuPlan:
    """What each program of a walk is about. Grid: sequences, heads, steps and, for the walk over queries, the query
    heads of a key head.

    gathered: whether each tile of queries has one key head of its own, which the second prefetched array names; over
    queries, heads are then part
    of the steps. over_queries: whether a program's own tile is one of keys.
    """

    b: int
    heads: int
    groups: int
    query_tiles: int
    key_tiles: int
    visit_list: VisitList
    gathered: bool
    over_queries: bool

    @property
    def sharing(self) -> int:
        """Query heads a key head."""
        return 1 if self.gathered else self.heads // self.groups

    @property
    def grid(self) -> tuple[Any, ...]:
        if self.over_queries:
            return self.b, 1 if self.gathered else self.groups, self.visit_list.longest, self.sharing
        return self.b, self.heads, self.visit_list.longest

    def step(self, at: Sequence[Any], memory: Sequence[Any]) -> Any:
        return self.visit_list.at(memory[0], at[0], at[2])

    def queries(self, *given: Any) -> tuple[Any, Any, Any]:
        at, memory = self._apart(given)
        step = self.step(at, memory)
        if not self.over_queries:
            return at[0], at[1], resident_tile(step)
        return at[0], 0 if self.gathered else at[1] * self.sharing + at[3], visited_tile(step)

    def keys(self, *given: Any) -> tuple[Any, Any, Any]:
        at, memory = self._apart(given)
        step = self.step(at, memory)
        if self.over_queries:
            own = resident_tile(step)
            return (
                (at[0], jax.lax.div(own, self.key_tiles), jax.lax.rem(own, self.key_tiles))
                if self.gathered
                else (at[0], at[1], own)
            )
        if self.gathered:
            return at[0], memory[1][at[0] * self.query_tiles + resident_tile(step)], visited_tile(step)
        return at[0], jax.lax.div(at[1], self.sharing) if self.sharing > 1 else at[1], visited_tile(step)

    def _apart(self, given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return given[: len(self.grid)], given[len(self.grid) :]


def run(
    kernel: Callable[..., None],
    plan: TpuPlan,
    key_heads: jax.Array | None,
    inputs: Sequence[BlockedArray],
    outputs: Sequence[BlockedArray],
    scratch: Sequence[tuple[int, int]],
    *,
    flops_a_step: int,
    exponentials_a_step: int,
    name: str,
) -> list[jax.Array]:
    """Calls a walk. scratch: shapes, fp32.

    Raises:
      ValueError: there are more visits than scalar memory holds.
    """
    prefetched = [jnp.asarray(plan.visit_list.steps)]
    if plan.gathered:
        assert key_heads is not None
        prefetched.append(key_heads.reshape(-1).astype(jnp.int32))
    taken = sum(4 * x.size for x in prefetched)
    if taken > SCALAR_BYTES:
        raise ValueError(
            f"scheduled attention: visits take {taken} bytes of a TPU's scalar memory; {SCALAR_BYTES} are left for them"
        )
    steps = plan.b * plan.heads * plan.visit_list.most
    how = dispatch.interpretation()
    semantics: Any = ("parallel", "parallel", *["arbitrary"] * (len(plan.grid) - 2))
    moved = sum(x.array.size * x.array.dtype.itemsize for x in (*inputs, *outputs))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=plan.grid,
            in_specs=[x.spec for x in inputs],
            out_specs=[x.spec for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x.array for x in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(
            flops=steps * flops_a_step, transcendentals=steps * exponentials_a_step, bytes_accessed=moved
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values",
        name=name,
    )(*prefetched, *(x.array for x in inputs))
