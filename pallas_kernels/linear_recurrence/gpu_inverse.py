"""The delta rule's triangular systems, of every chunk at once: one thread block, one warpgroup, for each chunk and
head.

Forwards, with L the strict triangle of e k^T weighted by pairs, and backwards, with P the triangle of q k^T:

    A = (I + L)^-1        w = A (reads . e)        u = A (strength . v)
                          w = A^T (writes . k)     u = scale (P A)^T do

A is put together from blocks of 1, 2, 4, ... tokens: with L' the squares that join the blocks of one size to those
twice as long,
A <- A - A L' A, two products of 64 x 64 a size. No power of L is formed: those can overflow where the inverse does not. Factors are the
sums of two bf16 numbers, high and low, and the product of the two low ones is left out: an error of about 2^-16 a
product.

Weights per token multiply rows or columns of A, so that tokens' arrays enter products as they were copied; what is made
takes the place of
what is no longer read. Times: docs/gpu_measured.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_decay
from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY, Decay
from recollect.pallas_kernels.linear_recurrence.gpu_chunk import seen, weighted
from recollect.pallas_kernels.linear_recurrence.gpu_decay import MARKED, MARKS
from recollect.pallas_kernels.linear_recurrence.gpu_plan import CHUNK, KEYED, READS, TOTAL, WRITES
from recollect.pallas_kernels.mosaic_gpu import plgpu

KEYS = (*KEYED, "e")  # arrays with the key size; others have the value size
SQUARE = (CHUNK, CHUNK)
Halves = tuple[Any, Any]  # references whose sum is a matrix: high, low


@dataclasses.dataclass(frozen=True)
class InversePlan:
    """What a kernel is built for. key_dim, value_dim: padded. tokens: e, k and v forwards, q, k and do backwards.
    weighted: whether tokens have scalar weights (gpu.weight_rows). has_strength: whether v is multiplied by a number
    per token. sums: whether the decay's running total is made here, and stored. keeps: whether A is stored."""

    b: int
    t: int
    heads: int
    key_dim: int
    value_dim: int
    decay: Decay
    tokens: tuple[str, ...]
    weighted: bool
    segmented: bool
    has_strength: bool = False
    sums: bool = False
    keeps: bool = False
    scale: float = 1.0

    @property
    def backwards(self) -> bool:
        """Whether A is given."""
        return "do" in self.tokens

    def copied(self) -> dict[str, Any]:
        """Shared memory of what is read."""
        space = {
            name: gpu.tiled((CHUNK, self.key_dim if name in KEYS else self.value_dim), jnp.bfloat16)
            for name in self.tokens
        }
        if self.backwards:
            space["inverse"] = gpu.tiled(SQUARE, jnp.bfloat16)
        if self.weighted:
            space["rows"] = gpu.plain((4, CHUNK), jnp.float32)
        if self.segmented:
            space["segments"] = gpu.plain((CHUNK,), jnp.int32)
        if self.sums:
            space["log_decay"] = gpu.tiled((CHUNK, self.key_dim), jnp.float32)
        elif self.decay == "key":
            space["total"] = gpu.tiled((CHUNK, self.key_dim), jnp.float32)
            space["marks"] = gpu.plain((MARKS, self.key_dim), jnp.float32)
        return space

    def space(self) -> dict[str, Any]:
        """Shared memory of what is made."""
        names = ["left_high", "left_low", "right_high", "right_low"]
        space = {name: gpu.tiled(SQUARE, jnp.bfloat16) for name in names}
        if self.has_strength:
            space["strength"] = gpu.plain((CHUNK,), jnp.float32)
        if self.sums:
            space["marks"] = gpu.plain((MARKS, self.key_dim), jnp.float32)
        if self.decay == "key":
            space["scaled"] = gpu.tiled((CHUNK, self.key_dim), jnp.bfloat16)
            space["references"] = gpu.plain(gpu_decay.reference_shape(self.key_dim), jnp.float32)
            space["ratios"] = gpu.plain((MARKS, self.key_dim), jnp.bfloat16)
        return space

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The kernel's outputs."""
        b, t, h = self.b, self.t, self.heads
        made = {
            "w": jax.ShapeDtypeStruct((b, t, h, self.key_dim), jnp.bfloat16),
            "u": jax.ShapeDtypeStruct((b, t, h, self.value_dim), jnp.bfloat16),
        }
        if self.sums:
            made["total"] = jax.ShapeDtypeStruct((b, t, h, self.key_dim), jnp.float32)
        if self.keeps:
            made["inverse"] = jax.ShapeDtypeStruct((b, h, t // CHUNK, *SQUARE), jnp.bfloat16)
        return made


def launch(plan: InversePlan, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel: inputs as gpu.py prepares them, results as `InversePlan.results` names them."""
    copied, space, results = plan.copied(), plan.space(), plan.results()
    names = (list(inputs), list(results), list(copied), list(space))

    def body(*refs: Any) -> None:
        rest = iter(refs)
        source, target, here, laid = ({name: next(rest) for name in group} for group in names)
        _InverseBlock(plan, source, target, here, laid).solve(next(rest), next(rest))

    made = gpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=[
            *copied.values(),
            *space.values(),
            plgpu.Barrier(num_arrivals=len(copied)),
            plgpu.Barrier(num_arrivals=MARKS),
        ],
        grid=(plan.heads, plan.t // CHUNK, plan.b),
        grid_names=("head", "chunk", "batch"),
        name="linear_recurrence_solve" + ("_transposed" if plan.backwards else ""),
    )(*inputs.values())
    return dict(zip(results, made, strict=True))


class _InverseBlock:
    """One thread block."""

    def __init__(
        self,
        plan: InversePlan,
        source: dict[str, Any],
        target: dict[str, Any],
        here: dict[str, Any],
        space: dict[str, Any],
    ) -> None:
        self.plan, self.source, self.target, self.here = plan, source, target, here
        self.head, self.at, self.batch = (jax.lax.axis_index(name) for name in ("head", "chunk", "batch"))
        self.space = space
        self.left: Halves = (space["left_high"], space["left_low"])
        self.right: Halves = (space["right_high"], space["right_low"])

    def solve(self, barrier: Any, marked: Any) -> None:
        """Reads a chunk, makes w and u, and stores them."""
        for name, place in self.here.items():
            plgpu.copy_gmem_to_smem(self.chunk_of(name), place, barrier)
        if self.plan.has_strength:
            # Of one head a token has 4 bytes, of which copies make nothing.
            tokens = self.source["strength"].at[self.batch, pl.ds(self.at * CHUNK, CHUNK), self.head]
            self.space["strength"][...] = gpu.load(tokens, plgpu.Layout.WGMMA.reduce(1), optimized=False)
        plgpu.barrier_wait(barrier)
        if self.plan.sums:
            self.sum_decays(marked)
        if self.plan.decay == "key":
            gpu_decay.lay_start(self.space["references"])
            gpu_decay.lay_references(self.space["references"], self.space["ratios"], self.here["marks"])
            plgpu.commit_smem()
        if self.plan.backwards:
            self.transposed()
        else:
            self.forwards()
        plgpu.wait_smem_to_gmem(0)

    def chunk_of(self, name: str) -> Any:
        """Where this chunk of an input lies."""
        ref = self.source[name]
        if name == "segments":
            return ref.at[self.batch, pl.ds(self.at * CHUNK, CHUNK)]
        if name in ("rows", "inverse"):
            return ref.at[self.batch, self.head if ref.shape[1] > 1 else 0, self.at]
        if name == "marks":
            return ref.at[self.batch, pl.ds(self.at * MARKS, MARKS), MARKED - 1, self.head]
        return ref.at[
            self.batch,
            pl.ds(self.at * CHUNK, CHUNK),
            jax.lax.div(self.head, jnp.int32(self.plan.heads // ref.shape[2])),
        ]

    def store(self, name: str, place: Any, value: jax.Array) -> None:
        """Starts to store w or u by way of shared memory that is read no more."""
        place[...] = value.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, self.target[name].at[self.batch, pl.ds(self.at * CHUNK, CHUNK), self.head])

    def sum_decays(self, barrier: Any) -> None:
        """Makes the running total in the place of the log decay, stores it, and reads its marks back."""
        place, (ones, *parts) = self.here["log_decay"], (*self.left, *self.right)
        row, column = gpu.row_and_column(SQUARE)
        ones[...] = jnp.where(column <= row, 1.0, 0.0).astype(jnp.bfloat16)
        for start in range(0, self.plan.key_dim, CHUNK):
            columns = pl.ds(start, CHUNK)
            rest = jnp.maximum(gpu.load(place.at[:, columns]), STRONGEST_CHANNEL_DECAY)
            for part in parts:  # three times 8 bits are all of fp32's
                high = rest.astype(jnp.bfloat16)
                part[...] = high
                rest = rest - high.astype(jnp.float32)
            plgpu.commit_smem()
            (first, *more) = [(ones, part) for part in parts]
            place.at[:, columns][...] = gpu.mm(*first, None, *more)
        plgpu.commit_smem()
        tokens = self.at * CHUNK
        plgpu.copy_smem_to_gmem(place, self.target["total"].at[self.batch, pl.ds(tokens, CHUNK), self.head])
        plgpu.wait_smem_to_gmem(0)
        self.here["total"], self.here["marks"] = place, self.space["marks"]
        for mark in range(MARKS):
            row = self.target["total"].at[self.batch, tokens + mark * MARKED + MARKED - 1, self.head]
            plgpu.copy_gmem_to_smem(row, self.space["marks"].at[mark], barrier)
        plgpu.barrier_wait(barrier)

    def forwards(self) -> None:
        """w = A (reads . e) and u = A (strength . v)."""
        plan, here = self.plan, self.here
        inverse = self.inverse(self.weighed("e", strict=True))
        _lay(self.right, inverse)
        reads = here["rows"].at[READS] if plan.weighted else None
        factor = self.right if reads is None else self.left
        if reads is not None:
            _lay(factor, inverse * gpu.along_rows(gpu.load_per_column(reads), CHUNK))
        e = here["e"]
        if plan.decay == "key":
            gpu_decay.scale_to_border(
                e, here["total"], here["marks"], self.space["references"], later=True, rounded=False
            )
        plgpu.commit_smem()
        if plan.keeps:
            plgpu.copy_smem_to_gmem(self.right[0], self.target["inverse"].at[self.batch, self.head, self.at])
        self.store("w", here["k"], gpu.mm(factor[0], e, None, (factor[1], e)))
        factor = self.right
        if plan.has_strength:
            factor = self.left
            _lay(factor, inverse * gpu.along_rows(gpu.load_per_column(self.space["strength"]), CHUNK))
            plgpu.commit_smem()
        self.store("u", here["v"], gpu.mm(factor[0], here["v"], None, (factor[1], here["v"])))

    def transposed(self) -> None:
        """w = A^T (writes . k) and u = scale (P A)^T do."""
        plan, here = self.plan, self.here
        _lay(self.left, self.weighed("q", strict=False))
        if plan.weighted:
            writes = gpu.along_columns(gpu.load_per_row(here["rows"].at[WRITES]), CHUNK)
            _lay(self.right, gpu.load(here["inverse"]).astype(jnp.float32) * writes)
        k = here["k"]
        if plan.decay == "key":
            gpu_decay.scale_to_border(
                k, here["total"], here["marks"], self.space["references"], later=False, rounded=False
            )
        plgpu.commit_smem()
        read = gpu.mm(self.left[0], here["inverse"], None, (self.left[1], here["inverse"])) * plan.scale
        factors = self.right if plan.weighted else (here["inverse"],)
        (first, *more) = [(gpu.transposed(factor), k) for factor in factors]
        self.store("w", here["k"], gpu.mm(*first, None, *more))
        _lay(self.left, read)
        plgpu.commit_smem()
        high, low = (gpu.transposed(half) for half in self.left)
        self.store("u", here["do"], gpu.mm(high, here["do"], None, (low, here["do"])))

    def weighed(self, rows: str, strict: bool) -> jax.Array:
        """(c, c) fp32: products of these rows with k, masked, weighted by pairs."""
        plan, here = self.plan, self.here
        if plan.decay == "key":
            scores, space = self.left[0], self.space
            # Of the two only e forwards and k backwards are read again.
            places = (here[rows], space["scaled"]) if plan.backwards else (space["scaled"], here["k"])
            operands = (here[rows], here["k"], *places)
            gpu_decay.scores_by_key(scores, *operands, here["total"], space["references"], space["ratios"], False)
            products = gpu.load(scores).astype(jnp.float32)
        else:
            products = gpu.mm(here[rows], gpu.transposed(here["k"]))
        total = here["rows"].at[TOTAL] if plan.decay == "head" else None
        return weighted(products, seen(here.get("segments"), False, strict), total, False)

    def inverse(self, lower: jax.Array) -> jax.Array:
        """(I + L)^-1, fp32."""
        row, column = gpu.row_and_column(SQUARE)
        found = jnp.where(row == column, 1.0, jnp.where(row ^ column == 1, -lower, 0.0))
        for level in range(1, (CHUNK - 1).bit_length()):
            row, column = gpu.row_and_column(SQUARE)
            # Where the highest bit that differs is this one, the two are in neighbouring blocks of one block twice as
            # long.
            _lay(self.left, jnp.where((row ^ column) >> level == 1, lower, 0.0))
            _lay(self.right, found)
            plgpu.commit_smem()
            product = _times(self.left, self.right)
            _lay(self.left, product)
            plgpu.commit_smem()
            found = found - _times(self.right, self.left)
        return found


def _lay(halves: Halves, matrix: jax.Array) -> None:
    high = matrix.astype(jnp.bfloat16)
    halves[0][...] = high
    halves[1][...] = (matrix - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _times(a: Halves, b: Halves) -> jax.Array:
    return gpu.mm(a[0], b[0], None, (a[0], b[1]), (a[1], b[0]))
