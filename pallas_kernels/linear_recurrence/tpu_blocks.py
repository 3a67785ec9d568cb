"""Where TPU kernels of the recurrence find their arrays: blocks of the rows of one chunk and of as many heads as
fill whole lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from recollect.pallas_kernels.linear_recurrence import tpu_chunk
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks
from recollect.pallas_kernels.linear_recurrence.tpu_chunk import Documents

LANES, SUBLANES = 128, 8
# Of the 16 MiB a program may take on v5e; the other half is for what it computes.
BLOCK_BYTES = 8 * 2**20
# Lanes of q and v together that a program should hold. The steps of one head wait for each other: in libtpu's schedule
# for v5e, four heads of 128 channels take six tenths of the instructions that they take one by one. More heads leave
# too few programs for two cores.
ENOUGH_LANES = 1024


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """How a call is cut: `group` heads a program; flat: rows as (b, t, h d), else as (b h, t, d) of one head a
    program."""

    heads: int
    group: int
    flat: bool

    def held(self, heads: int) -> int:
        """Heads of an operand with that many that a program holds."""
        return max(1, self.group * heads // self.heads)


def documents(ref) -> Documents:
    """Reads the chunk's documents from a kernel's inputs, as `BlockLayout.weights` names them."""
    segments, reach = ref["segments"][0, 0], ref["reach"][0, 0]
    return Documents(
        same=tpu_chunk.as_column(segments) == segments,
        starts=tpu_chunk.as_column(reach[0:1]),
        ends=tpu_chunk.as_column(reach[1:2]),
        keeps=reach[2:3, 0:1],
    )


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Arrays and the blocks of them that a program sees: grid (b, groups of heads, chunks in the order they are
    result)."""

    plan: HeadGroups
    b: int
    n: int
    c: int
    reverse: bool

    def rows(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        b, t, heads, d = x.shape
        spec = self._row_spec(heads, d)
        return (x.reshape(b, t, heads * d) if self.plan.flat else jnp.swapaxes(x, 1, 2).reshape(b * heads, t, d)), spec

    def new_rows(self, d: int, dtype) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        b, t, h = self.b, self.n * self.c, self.plan.heads
        return jax.ShapeDtypeStruct((b, t, h * d) if self.plan.flat else (b * h, t, d), dtype), self._row_spec(h, d)

    def as_rows(self, x: jax.Array, d: int) -> jax.Array:
        """(b, t, h, d) of what was made as `new_rows`."""
        b, t, h = self.b, self.n * self.c, self.plan.heads
        return x.reshape(b, t, h, d) if self.plan.flat else jnp.swapaxes(x.reshape(b, h, t, d), 1, 2)

    def a_token(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        return x.reshape(self.b, self.plan.heads, self.n, 1, self.c), self.new_a_token()[1]

    def new_a_token(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = jax.ShapeDtypeStruct((self.b, self.plan.heads, self.n, 1, self.c), jnp.float32)
        return shape, pl.BlockSpec((1, self.plan.group, 1, 1, self.c), lambda b, h, j: (b, h, self._chunk(j), 0, 0))

    def weights(self, chunks: Chunks) -> list[tuple[str, jax.Array, pl.BlockSpec]]:
        """Inputs: totals of a decay per head, and documents."""
        inputs = []
        if chunks.total is not None and chunks.decay == "head":
            inputs.append(("total", *self.a_token(chunks.total)))
        if chunks.segments is not None:
            b, n, c = self.b, self.n, self.c
            inputs += [("segments", *self.of_chunk(chunks.segments.reshape(b, n, 1, c)))]
            reach = [
                jnp.broadcast_to(x.reshape(b, n, -1), (b, n, c))
                for x in (chunks.starts, chunks.ends, chunks.keeps)
                if x is not None
            ]
            inputs += [("reach", *self.of_chunk(jnp.stack(reach, axis=2)))]
        return inputs

    def of_chunk(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        return x, pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h, j: (b, self._chunk(j), 0, 0))

    def state(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        return x, self.new_state(*x.shape[2:])[1]

    def new_state(self, key_dim: int, value_dim: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = jax.ShapeDtypeStruct((self.b, self.plan.heads, key_dim, value_dim), jnp.float32)
        return shape, pl.BlockSpec((1, self.plan.group, key_dim, value_dim), lambda b, h, j: (b, h, 0, 0))

    def new_checkpoints(self, key_dim: int, value_dim: int, groups, every) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = jax.ShapeDtypeStruct((self.b, self.plan.heads, groups, key_dim, value_dim), jnp.float32)
        block = (1, self.plan.group, 1, key_dim, value_dim)
        return shape, pl.BlockSpec(block, lambda b, h, j: (b, h, lax.div(self._chunk(j), every), 0, 0))

    def _row_spec(self, heads: int, d: int) -> pl.BlockSpec:
        sharing = self.plan.heads // heads
        if self.plan.flat:
            programs = max(1, sharing // self.plan.group)
            block = (1, self.c, self.plan.held(heads) * d)
            return pl.BlockSpec(block, lambda b, h, j: (b, self._chunk(j), lax.div(h, programs)))
        return pl.BlockSpec((1, self.c, d), lambda b, h, j: (b * heads + lax.div(h, sharing), self._chunk(j), 0))

    def _chunk(self, j):
        return self.n - 1 - j if self.reverse else j


def plan_heads(
    given: Mapping[str, Any], produced: dict[str, Any], heads: int, key_dim: int, value_dim: int, c: int
) -> HeadGroups:
    """The fewest heads a program that fill whole lanes and are enough, else the most that fit; one transposed head
    where none fit."""
    shapes = [(x.shape[2], x.shape[3], x.dtype.itemsize) for x in given.values()]
    shapes += [(heads, value_dim, dtype.itemsize) for dtype in produced.values()]
    fitting = [
        g for g in range(1, heads + 1) if heads % g == 0 and all(_whole_lanes(g, heads, hx, d) for hx, d, _ in shapes)
    ]
    fitting = [g for g in fitting if _block_bytes(g, heads, shapes, key_dim, value_dim, c) <= BLOCK_BYTES]
    if not fitting:
        return HeadGroups(heads, 1, False)
    enough = [g for g in fitting if g * (key_dim + value_dim) >= ENOUGH_LANES]
    return HeadGroups(heads, enough[0] if enough else fitting[-1], True)


def side_by_side(group: int, held: Iterable[int], key_dim: int, value_dim: int) -> int:
    """How many heads of a program share lanes in the kernel: as fill them, where every operand has a head for each."""
    if any(heads != group for heads in held) or key_dim % SUBLANES:
        return 1
    return max(
        heads
        for heads in range(1, group + 1)
        if group % heads == 0 and (heads == 1 or heads * max(key_dim, value_dim) <= LANES)
    )


def _whole_lanes(group: int, heads: int, operand_heads: int, d: int) -> bool:
    sharing = heads // operand_heads
    held = max(1, group // sharing)
    return (group % sharing == 0 or sharing % group == 0) and (held == operand_heads or held * d % LANES == 0)


def _block_bytes(group: int, heads: int, shapes, key_dim: int, value_dim: int, c: int) -> int:
    """Vector memory of a program's blocks: each is held twice, while the next is fetched; lanes are padded to whole
    ones."""
    rows = sum(2 * c * _up(max(1, group * hx // heads) * d, LANES) * itemsize for hx, d, itemsize in shapes)
    # The state at work, and twice each: the initial one, the last one and a checkpoint.
    return rows + 7 * group * _up(key_dim, SUBLANES) * _up(value_dim, LANES) * 4


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def check(rows: dict[str, jax.Array], chunks: Chunks, heads: int) -> None:
    """Checks rows, (b, t, heads, d) by name, and the size of chunks.

    Raises:
      ValueError: a chunk size that the TPU kernels do not take, or rows that do not fit v's or the heads.
    """
    b, t = rows["v"].shape[:2]
    c = chunks.size
    if c % SUBLANES or t % c:
        raise ValueError(
            f"linear_recurrence: the TPU kernels take chunks of a multiple of {SUBLANES} tokens that divides {t}; this is {c}"
        )
    if chunks.decay in ("key", "value") and c & (c - 1):
        raise ValueError(
            f"linear_recurrence: with a decay per channel the TPU kernels take chunks of a power of two; this is {c}"
        )
    for name, x in rows.items():
        if x.shape[:2] != (b, t) or heads % x.shape[2]:
            raise ValueError(
                f"linear_recurrence: {name} must be {(b, t)} + (a divisor of {heads}, channels); got {x.shape}"
            )
