"""The short convolution for Hopper GPUs, in Mosaic GPU: one pass over the tokens forward, one backward, bound by
memory.

A block of threads copies a tile of tokens and channels to shared memory, with the few tokens around it that taps reach,
and walks it token by token; each thread keeps a channel or two of the window in registers, results replace their
inputs, and a copy takes the tile
back. Backward walks twice: forwards for the gradients before the activation (a few tokens further than the tile, which
the inputs' gradients need), backwards for those of the inputs. Gradients of the taps are sums a tile, which XLA adds
up.

Copies clip what lies past the end of a row: reading gives zeros, writing nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import dispatch, mosaic_gpu
from recollect.pallas_kernels.gated_convolution import SHORT_DIMENSIONS, short_kernels
from recollect.pallas_kernels.gated_convolution.short_kernels import (
    BIAS_ROW,
    EDGE,
    WEIGHT_ROWS,
    Gradients,
    Operands,
    ShortKernel,
)
from recollect.pallas_kernels.sharding import over_mesh

THREADS = 128
LONGEST_TILE = 64
TILE_BYTES = (
    72 * 1024
)  # of shared memory, so that three blocks share a processor and copies of one hide behind work of another
UNROLLED = 8
LINKS = 32  # copies are of whole 128 bytes


def refuses(x, taps, bias=None, **settings: Any) -> dispatch.Refusal:
    """Why these kernels cannot serve a call; None if they can."""
    if taps.shape[0] > short_kernels.MAXIMUM_TAPS:
        return f"it has up to {short_kernels.MAXIMUM_TAPS} taps; this call {taps.shape[0]}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32; this is {x.dtype}"
    for name in ("in_gate", "out_gate"):
        gate = settings.get(name)
        if gate is not None and gate.dtype != x.dtype:
            return f"its gates have x's dtype; {name} is {gate.dtype}, x {x.dtype}"
    return mosaic_gpu.unavailable()


def _forward(operands: Operands, taps: int, activation: str) -> jax.Array:
    plan = _TilePlan(operands, taps, backward=False)
    names = list(plan.tiles)

    def body(*refs):
        ref = dict(zip([*plan.inputs, "y", *plan.scratch], refs, strict=True))
        tile = _Tile(plan, ref, 0)
        tile.fetch(names)
        window = tile.past()
        weights = [tile.vector(ref["weights_tile"].at[row]) for row in (*range(taps), BIAS_ROW)]

        def step(row, window):
            u, y = tile.convolved(row, window, weights)
            if activation == "silu":
                y = y * _sigmoid(y)
            if "out_gate" in plan.tiles:
                y = y * tile.row("out_gate", row)
            tile.put("x", row, tile.masked(y, row))
            return (u, *window[:-1])[: taps - 1]

        _walk(plan.length, step, window)
        tile.give({"x": "y"})

    (y,) = plan.launch(body, [plan.like_x()], "short_convolution_forward")
    return plan.cut(y)


def _backward(operands: Operands, dy: jax.Array, taps: int, activation: str) -> Gradients:
    plan = _TilePlan(operands, taps, backward=True, dy=dy)
    gated = [name for name in ("x", "in_gate", "out_gate") if name in plan.tiles]

    def body(*refs):
        ref = dict(
            zip([*plan.inputs, *("d_" + name for name in gated), "sums", "first", *plan.scratch], refs, strict=True)
        )
        tile = _Tile(plan, ref, plan.halo)
        tile.fetch(list(plan.tiles))
        weights = [tile.vector(ref["weights_tile"].at[row]) for row in (*range(taps), BIAS_ROW)]
        zero = tile.zeros()

        def before_activation(row, window):
            u, y = tile.convolved(row, window, weights)
            gradient = tile.row("dy", row)
            gate = _sigmoid(y) if activation == "silu" else None
            d_out_gate = None
            if "out_gate" in plan.tiles:
                d_out_gate = tile.masked(gradient * (y if gate is None else y * gate), row)
                gradient = gradient * tile.row("out_gate", row)
            if gate is not None:
                gradient = gradient * gate * (1 + y * (1 - gate))
            gradient = tile.masked(gradient, row)
            ref["gradients"].at[row][...] = gradient
            return u, gradient, d_out_gate

        def forwards(row, carry):
            window, sums = carry
            u, gradient, d_out_gate = before_activation(row, window)
            if d_out_gate is not None:
                tile.put("out_gate", row, d_out_gate)
            reached = [u, *(tile.reached(row, lag, window[lag - 1]) for lag in range(1, taps))]
            parts = [*(gradient * part for part in reached), gradient]
            sums = tuple(total + part for total, part in zip(sums, parts, strict=True))
            return (u, *window[:-1])[: taps - 1], sums

        window, sums = _walk(plan.length, forwards, (tile.past(), (zero,) * (taps + 1)))
        for row in range(plan.length, plan.length + taps - 1):
            u, _, _ = before_activation(row, window)
            window = (u, *window[:-1])[: taps - 1]
        for row in range(plan.length + taps - 1, plan.rows):
            ref["gradients"].at[row][...] = zero

        def backwards(step, after):
            row = plan.length - 1 - step
            gradient = tile.vector(ref["gradients"].at[row])
            inputs = weights[0] * gradient
            for lag in range(1, taps):
                inputs = inputs + weights[lag] * tile.following(row, lag, after[lag - 1])
            if "in_gate" in plan.tiles:
                x, gate = tile.row("x", row), tile.row("in_gate", row)
                tile.put("in_gate", row, tile.masked(inputs * x, row))
                inputs = inputs * gate
            tile.put("x", row, tile.masked(inputs, row))
            return (gradient, *after[:-1])[: taps - 1]

        after = tuple(tile.vector(ref["gradients"].at[plan.length + ahead]) for ahead in range(taps - 1))
        _walk(plan.length, backwards, after)
        for row, total in zip((*range(taps), BIAS_ROW), sums, strict=True):
            ref["weights_tile"].at[row][...] = total
        tile.give({name: "d_" + name for name in gated}, sums=True)

    parts = jax.ShapeDtypeStruct((plan.batch, plan.count, WEIGHT_ROWS, plan.channels), jnp.float32)
    first = jax.ShapeDtypeStruct((plan.batch, EDGE, plan.channels), jnp.float32)
    results = plan.launch(body, [*(plan.like_x() for _ in gated), parts, first], "short_convolution_backward")
    found = dict(zip([*gated, "weights", "first"], results, strict=True))
    sums = jnp.sum(found["weights"], axis=(0, 1))[None, :, : plan.width]
    used = [*range(taps), BIAS_ROW]
    weights = jnp.zeros_like(sums).at[:, jnp.array(used)].set(sums[:, jnp.array(used)])
    cut = {name: plan.cut(found[name]) for name in gated}
    return Gradients(cut["x"], cut.get("in_gate"), cut.get("out_gate"), weights, found["first"][:, :, : plan.width])


class _TilePlan:
    """Sizes of a launch, its arrays padded to what copies can slice, and its shared memory."""

    def __init__(self, operands: Operands, taps: int, *, backward: bool, dy: jax.Array | None = None):
        x = operands.x
        self.batch, self.tokens, self.width = x.shape
        self.taps = taps
        self.dtype = x.dtype
        self.backward = backward
        tiles = {"x": x, "in_gate": operands.in_gate, "out_gate": operands.out_gate, "dy": dy}
        present = {name: array for name, array in tiles.items() if array is not None}
        self.halo = 4 if taps <= 5 else 8
        self.lanes = 2 * THREADS if self.width > THREADS and not backward else THREADS
        row_bytes = self.lanes * (len(present) * x.dtype.itemsize + 4 * backward)
        self.length = LONGEST_TILE
        while self.length > UNROLLED and row_bytes * (self.length + 2 * self.halo) > TILE_BYTES:
            self.length //= 2
        self.rows = self.length + self.halo * backward
        self.count = -(-self.tokens // self.length)
        least = max(self.tokens, self.rows)
        # Copies need rows of whole 16 bytes, and arrays not smaller than what they slice.
        self.channels = max(mosaic_gpu.round_up(self.width, 16 // x.dtype.itemsize), self.lanes)
        self.tiles = {name: self._padded(array, least) for name, array in present.items()}
        self.padded_tokens = least
        self.around = [name for name in ("x", "in_gate") if name in present]
        self.inputs = dict(self.tiles)
        self.inputs["weights"] = mosaic_gpu.pad_last(operands.weights, self.channels)
        self.inputs["state"] = mosaic_gpu.pad_last(operands.state[:, EDGE - self.halo :], self.channels)
        if operands.links is not None:
            size = mosaic_gpu.round_up(self.rows, LINKS)
            end = mosaic_gpu.round_up((self.count - 1) * self.length + size, 4)
            self.inputs["links"] = jnp.pad(operands.links, ((0, 0), (0, end - self.tokens)), constant_values=-1)
        self.scratch = {name + "_tile": mosaic_gpu.plain((self.rows, self.lanes), self.dtype) for name in self.tiles}
        self.scratch |= {
            name + "_before": mosaic_gpu.plain((self.halo, self.lanes), self.dtype) for name in self.around
        }
        self.scratch["weights_tile"] = mosaic_gpu.plain((WEIGHT_ROWS, self.lanes), jnp.float32)
        self.scratch["past"] = mosaic_gpu.plain((self.halo, self.lanes), jnp.float32)
        if backward:
            self.scratch["gradients"] = mosaic_gpu.plain((max(self.rows, EDGE), self.lanes), jnp.float32)
        arrivals = len(self.tiles) + 1
        if operands.links is not None:
            self.scratch["links_tile"] = mosaic_gpu.plain((size,), jnp.int32)
            arrivals += 1
        self.scratch["arrived"] = mosaic_gpu.plgpu.Barrier(num_arrivals=arrivals)
        self.scratch["arrived_state"] = mosaic_gpu.plgpu.Barrier(num_arrivals=1)
        self.scratch["arrived_before"] = mosaic_gpu.plgpu.Barrier(num_arrivals=len(self.around))

    def _padded(self, array: jax.Array, tokens: int) -> jax.Array:
        missing = ((0, 0), (0, tokens - array.shape[1]), (0, self.channels - array.shape[2]))
        return jnp.pad(array, missing) if any(after for _, after in missing) else array

    def like_x(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.padded_tokens, self.channels), self.dtype)

    def cut(self, array: jax.Array) -> jax.Array:
        return array[:, : self.tokens, : self.width]

    def launch(self, body, results, name: str):
        run = mosaic_gpu.kernel(
            body,
            out_type=results,
            scratch_types=list(self.scratch.values()),
            grid=(-(-self.channels // self.lanes), self.count, self.batch),
            grid_names=("channels", "tile", "row"),
            name=name,
        )
        return run(*self.inputs.values())


class _Tile:
    """What one block of threads does with its tile."""

    def __init__(self, plan: _TilePlan, ref: dict[str, Any], after: int):
        self.plan, self.ref = plan, ref
        self.batch = jax.lax.axis_index("row")
        self.index = jax.lax.axis_index("tile")
        self.start = self.index * plan.length
        self.columns = pl.ds(jax.lax.axis_index("channels") * plan.lanes, plan.lanes)
        self.layout = mosaic_gpu.plgpu.Layout.WG_STRIDED((plan.lanes,), vec_size=plan.lanes // THREADS)

    def fetch(self, names: list[str]) -> None:
        """Copies the tile, and the inputs before it to `past` in fp32."""
        plan, ref, plgpu = self.plan, self.ref, mosaic_gpu.plgpu
        for name in names:
            source = ref[name].at[self.batch, pl.ds(self.start, plan.rows), self.columns]
            plgpu.copy_gmem_to_smem(source, ref[name + "_tile"], ref["arrived"])
        plgpu.copy_gmem_to_smem(ref["weights"].at[:, self.columns], ref["weights_tile"], ref["arrived"])
        if "links_tile" in ref:
            plgpu.copy_gmem_to_smem(
                ref["links"].at[self.batch, pl.ds(self.start, ref["links_tile"].shape[0])],
                ref["links_tile"],
                ref["arrived"],
            )

        @pl.when(self.index == 0)
        def _():
            plgpu.copy_gmem_to_smem(ref["state"].at[self.batch, :, self.columns], ref["past"], ref["arrived_state"])
            plgpu.barrier_wait(ref["arrived_state"])

        @pl.when(self.index > 0)
        def _():
            for name in plan.around:
                source = ref[name].at[self.batch, pl.ds(self.start - plan.halo, plan.halo), self.columns]
                plgpu.copy_gmem_to_smem(source, ref[name + "_before"], ref["arrived_before"])
            plgpu.barrier_wait(ref["arrived_before"])
            for row in range(plan.halo):
                values = [self.vector(ref[name + "_before"].at[row]).astype(jnp.float32) for name in plan.around]
                ref["past"].at[row][...] = functools.reduce(jnp.multiply, values)

        plgpu.barrier_wait(ref["arrived"])

    def past(self) -> tuple[jax.Array, ...]:
        """The inputs before the tile, newest first."""
        return tuple(self.vector(self.ref["past"].at[self.plan.halo - lag]) for lag in range(1, self.plan.taps))

    def vector(self, ref: Any) -> jax.Array:
        return mosaic_gpu.load(ref, self.layout)

    def zeros(self) -> jax.Array:
        return mosaic_gpu.plgpu.layout_cast(jnp.zeros((self.plan.lanes,), jnp.float32), self.layout)

    def row(self, name: str, row) -> jax.Array:
        return self.vector(self.ref[name + "_tile"].at[row]).astype(jnp.float32)

    def put(self, name: str, row, values: jax.Array) -> None:
        self.ref[name + "_tile"].at[row][...] = values.astype(self.plan.dtype)

    def convolved(self, row, window, weights) -> tuple[jax.Array, jax.Array]:
        """The input of a token and its output before the activation."""
        u = self.row("x", row)
        if "in_gate" in self.plan.tiles:
            u = u * self.row("in_gate", row)
        u = self.masked(u, row)
        total = weights[-1] + weights[0] * u
        for lag in range(1, self.plan.taps):
            total = total + weights[lag] * self.reached(row, lag, window[lag - 1])
        return u, total

    def masked(self, values: jax.Array, row) -> jax.Array:
        return self._where(lambda links: links >= 0, row, values)

    def reached(self, row, lag: int, values: jax.Array) -> jax.Array:
        return self._where(lambda links: (links >= 0) & ((links & 15) >= lag), row, values)

    def following(self, row, lag: int, values: jax.Array) -> jax.Array:
        return self._where(lambda links: links >= 16 * lag, row, values)

    def _where(self, holds, row, values: jax.Array) -> jax.Array:
        if "links_tile" not in self.ref:
            return values
        return jnp.where(holds(self.ref["links_tile"][row]), values, jnp.zeros_like(values))

    def give(self, results: dict[str, str], *, sums: bool = False) -> None:
        """Copies tiles out; with `sums` also the gradients of taps and those before the activation of the first
        tokens."""
        plan, ref, plgpu = self.plan, self.ref, mosaic_gpu.plgpu
        plgpu.commit_smem()
        for name, result in results.items():
            target = ref[result].at[self.batch, pl.ds(self.start, plan.length), self.columns]
            plgpu.copy_smem_to_gmem(ref[name + "_tile"].at[pl.ds(0, plan.length)], target)
        if sums:
            plgpu.copy_smem_to_gmem(ref["weights_tile"], ref["sums"].at[self.batch, self.index, :, self.columns])

            @pl.when(self.index == 0)
            def _():
                plgpu.copy_smem_to_gmem(
                    ref["gradients"].at[pl.ds(0, EDGE)], ref["first"].at[self.batch, :, self.columns]
                )

        plgpu.wait_smem_to_gmem(0)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def _walk(length: int, step, carry):
    """carry = step(row, carry) for rows 0 to length - 1, a few at a time."""

    def some(group, carry):
        for row in range(UNROLLED):
            carry = step(group * UNROLLED + row, carry)
        return carry

    return jax.lax.fori_loop(0, length // UNROLLED, some, carry)


short_convolution = over_mesh(
    functools.partial(short_kernels.short_convolution, ShortKernel(_forward, _backward)),
    SHORT_DIMENSIONS,
    ("b t h", "b s h"),
)
