"""The kernel behind gpu.py: one thread block of one or two warpgroups, walking from chunk to chunk.

The state stays in registers in fp32; products read its bf16 copy in shared memory. While a chunk is computed, the
copies of the next one fly into the other stage, if there is one. In a chunk, with S the copy:

    y = v - w S                                       delta rule alone; else y = v
    P = mask(q k^T) weighted by pairs                 gpu_chunk.py, or gpu_channels.py where the decay has channels
    o = scale (reads . q S + P y)                     q S runs while P is weighted
    state = keep . state + k^T (writes . y)           writes . y takes the place of v in its stage; second pairs likewise

Shared memory is filled from registers in three batches a chunk, each made visible to the tensor cores (committed)
before it is read: S; P; and writes . y together with o, which takes the place of P where they have one size. Decays by
channel take more (gpu_channels.py): there queries and keys are weighted in their stages, most of the work, which two
warpgroups with columns of their own share at size 128.

Time may be cut in spans, each with thread blocks of its own. Where spans end, states are found first, by the same
steps with neither q nor o (`states_only`), of all spans but the last, from S = 0. With the delta rule a span's last
state is linear in its first, S' = T S + ...: more blocks of columns, which start from the identity and write no v,
leave T.

Registers are what binds (255 a thread). A product's operands are named by descriptors, which the compiler makes outside
the loop and
keeps, two registers each, wherever an address does not vary: so work space is indexed by a zero read from memory
(`nought`). At size 128 shared memory holds two blocks a core in plain walks with no decay or one per head, in joined
ones with one stage (`ScanPlan.stage_count`), and under decays by value channel; else one. Times: docs/gpu_measured.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_decay
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Decay
from recollect.pallas_kernels.linear_recurrence.gpu_channels import ChunkByKey, ChunkByValue
from recollect.pallas_kernels.linear_recurrence.gpu_chunk import Chunk
from recollect.pallas_kernels.linear_recurrence.gpu_decay import MARKED, MARKS
from recollect.pallas_kernels.linear_recurrence.gpu_plan import CHUNK, KEYED, ScanPlan
from recollect.pallas_kernels.mosaic_gpu import plgpu

KINDS: dict[Decay, type[Chunk]] = {"none": Chunk, "head": Chunk, "key": ChunkByKey, "value": ChunkByValue}


def launch(plan: ScanPlan, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel: inputs as gpu.py prepares them, results as `ScanPlan.results` names them."""
    groups, warpgroups = plan.groups(), plan.warpgroups
    stages = {name: count for names, count in groups for name in names}
    staged = {
        name: plan.buffer((stages[name], *plan.own(name), *shape), dtype, tile)
        for name, (shape, dtype, tile) in plan.stages().items()
    }
    space = {name: plan.buffer((1, *plan.own(name), *shape), dtype) for name, (shape, dtype) in plan.space().items()}
    space |= {name: plan.buffer((1, *shape), dtype, False) for name, (shape, dtype) in plan.plain_space().items()}
    copies = [sum(warpgroups if plan.own(name) else 1 for name in group) for group, _ in groups]
    barriers = [
        plgpu.Barrier(num_arrivals=many, num_barriers=count) for many, (_, count) in zip(copies, groups, strict=True)
    ]
    meeting = [plgpu.Barrier(num_arrivals=warpgroups)] if warpgroups > 1 else []
    results = plan.results()
    names = (list(inputs), list(results), list(staged), list(space))

    def body(*refs: Any) -> None:
        rest = iter(refs)
        source, target, stage, laid = ({name: next(rest) for name in group} for group in names)
        _ScanBlock(plan, source, target, stage, laid, next(rest), list(rest)).walk()

    made = gpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=[*staged.values(), *space.values(), gpu.plain((warpgroups,), jnp.int32), *barriers, *meeting],
        grid=(plan.splits // warpgroups, plan.heads, plan.b * (plan.spans - plan.states_only)),
        grid_names=("columns", "head", "batch"),
        name="linear_recurrence_"
        + ("delta_scan" if "w" in plan.tokens else "walk")
        + ("_states" if plan.states_only else ""),
        threads=warpgroups if warpgroups > 1 else None,
    )(*inputs.values())
    return dict(zip(results, made, strict=True))


class _ScanBlock:
    """One thread block, as one of its warpgroups sees it."""

    def __init__(
        self,
        plan: ScanPlan,
        source: dict[str, Any],
        target: dict[str, Any],
        stage: dict[str, Any],
        space: dict[str, Any],
        nought: Any,
        barriers: list[Any],
    ) -> None:
        self.plan, self.source, self.target = plan, source, target
        self.stage, self.laid = stage, space
        self.groups = [(*group, barrier) for group, barrier in zip(plan.groups(), barriers, strict=False)]
        self.meeting = barriers[-1]
        self.split, self.head, self.batch = (jax.lax.axis_index(name) for name in ("columns", "head", "batch"))
        self.shares = plan.warpgroups > 1
        self.warpgroup = jax.lax.axis_index("warpgroup") if self.shares else 0
        self.nought = nought.at[self.warpgroup]
        self.columns = self.columns_of(self.warpgroup)
        self.first: Any = 0  # step of the whole walk with which this span begins
        self.count: Any = plan.span
        if plan.transition:
            blocks = plan.value_dim // plan.columns
            self.columns = pl.ds(jnp.minimum(self.split, blocks - 1) * plan.columns, plan.columns)
            self.writes = jnp.where(self.split < blocks, 1.0, 0.0)  # what v and second_v are multiplied by
        if plan.spans > 1:
            run = jnp.int32(plan.spans - plan.states_only)
            self.span, self.batch = jax.lax.rem(self.batch, run), jax.lax.div(self.batch, run)
            self.first = self.span * plan.span
            if not plan.states_only and plan.n % plan.span:
                self.count = jnp.minimum(plan.n - self.first, plan.span)

    def columns_of(self, warpgroup: Any) -> Any:
        """A warpgroup's columns of the state."""
        return pl.ds((self.split * self.plan.warpgroups + warpgroup) * self.plan.columns, self.plan.columns)

    def part(self) -> Any:
        """The channels that this warpgroup makes operands of; None for all."""
        return pl.ds(self.warpgroup * gpu_decay.SLICE, gpu_decay.SLICE) if self.shares else None

    def meet(self) -> None:
        """Waits until all warpgroups are here."""
        if self.shares:
            plgpu.barrier_arrive(self.meeting)
            plgpu.barrier_wait(self.meeting)

    def alone(self, action: Callable[[], None]) -> None:
        """Has the first warpgroup do it."""
        if self.shares:
            pl.when(self.warpgroup == 0)(action)
        else:
            action()

    def walk(self) -> None:
        """All chunks of the span."""
        plan = self.plan
        self.nought[...] = jnp.int32(0)
        self.alone(self.start)
        if plan.transition:
            row, column = gpu.row_and_column((plan.key_dim, plan.columns))
            first = self.split * plan.columns - plan.value_dim  # negative for values, which start from 0
            state = jnp.where((row == column + first) & (column + first >= 0), 1.0, 0.0)
        elif plan.enters:
            place = (self.batch, self.head) if plan.spans == 1 else (self.batch, self.span, self.head)
            state = gpu.load(self.source["initial"].at[(*place, slice(None), self.columns)], optimized=False)
        else:
            state = gpu.filled((plan.key_dim, plan.columns), 0.0)
        state = jax.lax.fori_loop(0, self.count, self.step, state)
        # Through `nought`, so that the address is not taken for the initial state's and kept in registers all the way.
        head = self.head + self.nought[...]
        if plan.states_only:
            columns = pl.ds(self.split * plan.columns, plan.columns)
            self.target["state"].at[self.batch, self.span, head, :, columns][...] = state
        else:

            @pl.when(self.first + self.count == plan.n)
            def _() -> None:
                self.target["state"].at[self.batch, head, :, self.columns][...] = state

        plgpu.wait_smem_to_gmem(0)

    def start(self) -> None:
        """What is there before the first chunk."""
        if self.plan.by_channel:
            gpu_decay.lay_start(self.laid["references"].at[0])
        for group in range(len(self.groups)):
            for step in range(min(self.groups[group][1], self.plan.span)):
                pl.when(step < self.count)(functools.partial(self.fetch, jnp.int32(step), step, group))

    def at(self, step: jax.Array) -> jax.Array:
        """The chunk that is result over in a step of the span."""
        step = self.first + step
        return self.plan.n - 1 - step if self.plan.reverse else step

    def fetch(self, step: jax.Array, slot: Any, group: int) -> None:
        """Starts the copies of a group of a step's chunk."""
        names, _, barrier = self.groups[group]
        for name in names:
            for part in range(self.plan.warpgroups if self.plan.own(name) else 1):
                place = self.stage[name].at[(slot, part) if self.plan.own(name) else slot]
                columns = self.columns_of(part) if self.shares else self.columns
                plgpu.copy_gmem_to_smem(self.chunk_of(name, self.at(step), columns), place, barrier.at[slot])

    def refetch(self, step: jax.Array, slot: Any, group: int) -> None:
        """Starts the copies of a group that take the place of a step's, which all warpgroups have read."""
        if group >= len(self.groups):
            return
        stages = self.groups[group][1]

        @pl.when((step + stages < self.count) & (self.warpgroup == 0))
        def _() -> None:
            self.fetch(step + stages, slot, group)

    def chunk_of(self, name: str, at: jax.Array, of_values: Any) -> Any:
        """Where a chunk of an input lies. of_values: the columns, where they are the values' own."""
        ref, tokens = self.source[name], pl.ds(at * CHUNK, CHUNK)
        if name == "segments":
            return ref.at[self.batch, tokens]
        if name == "rows":
            return ref.at[self.batch, self.head if ref.shape[1] > 1 else 0, at]
        keyed = name in KEYED or (self.plan.decay == "key" and name in ("total", "marks"))
        columns = slice(None) if keyed else of_values
        if name == "marks":
            return ref.at[self.batch, pl.ds(at * MARKS, MARKS), MARKED - 1, self.head, columns]
        return ref.at[self.batch, tokens, jax.lax.div(self.head, jnp.int32(self.plan.heads // ref.shape[2])), columns]

    def chunk_to(self, name: str, at: jax.Array) -> Any:
        """Where a chunk of an output lies."""
        return self.target[name].at[self.batch, pl.ds(at * CHUNK, CHUNK), self.head, self.columns]

    def step(self, step: jax.Array, state: jax.Array) -> jax.Array:
        """One chunk: from the state that enters it to the state that leaves it."""
        nought = self.nought[...]
        plan, at = self.plan, self.at(step)
        slots = [nought if stages == 1 else jax.lax.rem(step, jnp.int32(stages)) for _, stages, _ in self.groups]
        slot_of = {name: slot for (names, _, _), slot in zip(self.groups, slots, strict=True) for name in names}

        def own(name: str, ref: Any, slot: Any) -> Any:
            return ref.at[(slot, self.warpgroup) if plan.own(name) else slot]

        space = {name: own(name, ref, nought) for name, ref in self.laid.items()}
        here = {name: own(name, ref, slot_of[name]) for name, ref in self.stage.items()}
        chunk = KINDS[plan.decay](plan, here, space, self.part(), self.meet)
        if plan.checkpoint_every is not None:
            self.checkpoint(at, state)
        if "state" in space and (not plan.reads_rest or "w" in plan.tokens):
            space["state"][...] = state.astype(jnp.bfloat16)
        for (_, _, barrier), slot in zip(self.groups, slots, strict=True):
            plgpu.barrier_wait(barrier.at[slot])
        if plan.by_channel:
            self.alone(lambda: gpu_decay.lay_references(space["references"], space["ratios"], here["marks"]))
            self.meet()
        plgpu.commit_smem()
        y = here["v"]
        if "w" in plan.tokens:
            y = space["y"]
            self.erase(chunk)
            if plan.keeps_y:
                plgpu.copy_smem_to_gmem(y, self.chunk_to("y", at))
        if "q" in plan.tokens:
            if "w" not in plan.tokens:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's o
            if plan.reads_rest:
                space["state"][...] = (state * chunk.rest()).astype(jnp.bfloat16)
            self.lay_out("o", chunk.read(y, lambda: self.refetch(step, slots[-1], 1)), plan.scale, chunk, at)
        if "second_q" in plan.tokens:
            out = chunk.read_pairs("second_q", y, space["second_scores"], True)
            self.lay_out("second_o", out, plan.second_scale, chunk, at)
        (left, right), *second = chunk.writes(y)
        keep = chunk.keep()
        rest = chunk.rest() if plan.writes_rest else None
        plgpu.commit_smem()
        self.meet()
        for name, place in plan.outputs.items():
            plgpu.copy_smem_to_gmem(space[place], self.chunk_to(name, at))
        state = state if keep is None else state * keep
        if second and plan.second_scale != 1.0:
            # In fp32, by way of the state: an operand times the scale would be rounded once more.
            state = gpu.mm(*second[0], state * (1.0 / plan.second_scale)) * plan.second_scale
            second = []
        state = gpu.mm(left, right, state, *second)
        if rest is not None:
            state = state * rest

        self.meet()
        self.refetch(step, slots[0], 0)
        return state

    def erase(self, chunk: Chunk) -> None:
        """Lays out y = v - w S, and commits it."""
        here, space = chunk.here, chunk.space
        value = gpu.load(here["v"]).astype(jnp.float32)
        if self.plan.transition:
            value = value * self.writes
            if "second_v" in self.plan.tokens:
                second = gpu.load(here["second_v"]).astype(jnp.float32) * self.writes
                here["second_v"][...] = second.astype(jnp.bfloat16)
        erased = value - gpu.mm(here["w"], space["state"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's y and o
        space["y"][...] = erased.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def lay_out(self, name: str, out: jax.Array, scale: float, chunk: Chunk, at: jax.Array) -> None:
        """Lays out what was read, times scale, to be stored, and stores its dots."""
        out = out if scale == 1.0 else out * scale
        second = "second_" if name == "second_o" else ""
        if f"{second}dot_with" in self.plan.tokens:
            dots = jnp.sum(out * gpu.load(chunk.here[f"{second}dot_with"]).astype(jnp.float32), axis=1)
            self.target[f"{second}dots"].at[self.split, self.batch, self.head, pl.ds(at * CHUNK, CHUNK)][...] = dots
        chunk.space[self.plan.outputs[name]][...] = out.astype(self.plan.out_dtype)

    def checkpoint(self, at: jax.Array, state: jax.Array) -> None:
        """Stores the state where a group of chunks is entered."""
        every = jnp.int32(self.plan.checkpoint_every)
        within = jax.lax.rem(at, every)
        enters = (at == self.plan.n - 1) | (within == every - 1) if self.plan.reverse else within == 0

        @pl.when(enters)
        def _() -> None:
            self.target["checkpoints"].at[self.batch, self.head, jax.lax.div(at, every), :, self.columns][...] = state
