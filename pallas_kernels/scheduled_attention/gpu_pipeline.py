"""What the three Mosaic GPU kernels of scheduled attention share: a thread block's walk over the tiles that its own
tile visits.

The own side (queries in the forward pass and for dq, keys for dk and dv) is split into 64 rows a warpgroup. The other
side passes through
stages of shared memory that all warpgroups read: copies of the next tiles fly while one is computed. Which tiles those
are, the first warpgroup reads from device memory when it starts their copies; whether a tile's mask must be looked at
is read one step ahead.

A stage is filled again in the middle of the next step, when the other warpgroup has most likely left it too: that wait
costs nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.mosaic_gpu import plgpu
from recollect.pallas_kernels.scheduled_attention.block_schedule import tile_allows
from recollect.pallas_kernels.scheduled_attention.gpu_plan import LOG2_E, ROWS, GpuPlan


def launch(plan: GpuPlan, inputs: Mapping[str, jax.Array], run: Callable[[TilePipeline], None]) -> dict[str, jax.Array]:
    """Runs `run` on every thread block.

    Args:
      inputs: q (b, n, h, k), k, v and do, bf16; count, index and partial of the visits; key_heads (b, tiles) where
        gathered; sinks (h,) fp32; rows (b, h, 2, n) fp32, log-sum-exps times log2(e) and deltas; query_fields (b | 1,
        fields, n) and key_fields int32.
    """
    stages = plan.stage_count()
    staged = {name: _memory((stages, *shape), dtype, tile) for name, (shape, dtype, tile) in plan.stages().items()}
    resident, scratch = (
        {name: _memory(*what) for name, what in group.items()}
        for group in (plan.resident_arrays(), plan.scratch_arrays())
    )
    meeting = [plgpu.Barrier(num_arrivals=plan.warpgroups)] if plan.takes_turns else []
    results = plan.results()
    names = (list(inputs), list(results), list(staged), list(resident), list(scratch))

    def body(*refs: Any) -> None:
        rest = iter(refs)
        source, target, stage, resident, scratch_refs = ({name: next(rest) for name in group} for group in names)
        run(TilePipeline(plan, stages, source, target, stage, resident, scratch_refs, *rest))

    made = gpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=[
            *staged.values(),
            *resident.values(),
            *scratch.values(),
            plgpu.Barrier(num_arrivals=len(staged), num_barriers=stages),
            plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=len(resident), num_barriers=plan.warpgroups),
            gpu.plain((plan.warpgroups,), jnp.int32),
            *meeting,
        ],
        grid=plan.grid,
        grid_names=("head", "tile", "batch"),
        name=f"scheduled_attention_{plan.kernel}",
        threads=plan.warpgroups,
    )(*inputs.values())
    return dict(zip(results, made, strict=True))


def _memory(shape: tuple[int, ...], dtype: Any, tile: bool) -> Any:
    return gpu.tiled(shape, dtype) if tile else gpu.plain(shape, dtype)


class TilePipeline:
    """One thread block, as one of its warpgroups sees it."""

    def __init__(
        self,
        plan: GpuPlan,
        stages: int,
        source: dict[str, Any],
        target: dict[str, Any],
        stage: dict[str, Any],
        resident: dict[str, Any],
        scratch: dict[str, Any],
        filled: Any,
        emptied: Any,
        resident_ready: Any,
        numbers: Any,
        meeting: Any = None,
    ) -> None:
        self.plan, self.stages, self.source, self.target, self.stage = plan, stages, source, target, stage
        self.filled, self.emptied, self.resident_ready = filled, emptied, resident_ready
        self.meeting = meeting
        self.head, tile, self.batch = (jax.lax.axis_index(name) for name in ("head", "tile", "batch"))
        # The last queries may see the most keys, and the first keys be seen by the most queries: the longest walks
        # start first.
        self.tile = tile if plan.over_queries else plan.grid[1] - 1 - tile
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.tokens = pl.ds((self.tile * plan.warpgroups + self.warpgroup) * ROWS, ROWS)
        self.all_warpgroups = resident, scratch
        self.numbers = numbers
        self.point_to(self.warpgroup)
        if plan.gathered:
            self.key_head = self.head if plan.over_queries else source["key_heads"][self.batch, self.tile]
        else:
            self.key_head = self.head if plan.over_queries else _quotient(self.head, plan.sharing)
        self.list = (
            self.batch if plan.visits[0] > 1 else 0,
            self.head if plan.visits[1] > 1 else 0,
            self.tile,
        )
        self.count = source["count"][self.list]
        self.parts = plan.streamed_tile // plan.part_rows
        self.steps = self.count * (self.parts * plan.repeats)

    def point_to(self, warpgroup: jax.Array) -> None:
        """Points `own` and `space` to what is a warpgroup's."""
        self.resident, self.scratch = (
            {name: ref.at[warpgroup] for name, ref in group.items()} for group in self.all_warpgroups
        )

    def run(
        self, accumulate: Callable[[PipelineStep, Any], Any], carry: Any, once: Callable[[], None] = lambda: None
    ) -> Any:
        """Folds `accumulate` over all parts, in order. once: called before the first, when the own rows are there."""
        plan = self.plan

        for name, ref in self.resident.items():
            region = self.source[name]
            if name == plan.resident_fields:
                region = region.at[self.batch if region.shape[0] > 1 else 0, :, self.tokens]
            else:
                region = region.at[self.batch, self.tokens, self.key_head if name in ("k", "v") else self.head]
            plgpu.copy_gmem_to_smem(region, ref, self.resident_ready.at[self.warpgroup])

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            for number in range(self.stages):

                @pl.when(number < self.steps)
                def _(number: int = number) -> None:
                    self.fetch(jnp.int32(number), number)

        plgpu.barrier_wait(self.resident_ready.at[self.warpgroup])
        once()

        def one(number: jax.Array, carry: Any) -> Any:
            carry, partial = carry
            slot = jax.lax.rem(number, jnp.int32(self.stages))
            following = self.partial(number + 1)
            plgpu.barrier_wait(self.filled.at[slot])
            if plan.kernel != "forward":
                # By a number that the compiler does not know: it would else work out the addresses of all operands
                # before the first step, and keep them in registers that are lacking step.
                self.point_to(self.numbers[self.warpgroup])
            carry = accumulate(PipelineStep(self, number, slot, partial), carry)

            @pl.when(number + self.stages < self.steps)  # else nothing waits for it
            def _() -> None:
                plgpu.barrier_arrive(self.emptied.at[slot])

            if self.stages == 1:
                self.fill(number + 1)
            return carry, following

        self.numbers[self.warpgroup] = self.warpgroup
        if plan.takes_turns:
            pl.when(self.warpgroup == 1)(self.sync_warpgroups)  # which sets it half a step back
        carry, _ = jax.lax.fori_loop(0, self.steps, one, (carry, self.partial(jnp.int32(0))))
        if plan.takes_turns:
            pl.when(self.warpgroup == 0)(self.sync_warpgroups)
        self.point_to(self.warpgroup)
        return carry

    def place(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a step: the repeat, the visit and the piece of its tile."""
        plan = self.plan
        repeat = jnp.int32(0)
        if plan.repeats > 1:
            steps_per_repeat = jnp.maximum(self.count, 1) * self.parts
            repeat = jax.lax.div(number, steps_per_repeat)
            number = number - repeat * steps_per_repeat
        visit = _quotient(number, self.parts)
        return repeat, visit, number - visit * self.parts

    def partial(self, number: jax.Array) -> jax.Array:
        """1 where a step's mask must be looked at."""
        if not self.plan.masked:
            return jnp.int32(0)
        _, visit, _ = self.place(jnp.minimum(number, jnp.maximum(self.steps, 1) - 1))
        return self.source["partial"][(*self.list, visit)]

    def fetch(self, number: jax.Array, slot: Any) -> None:
        """Starts the copies of a step's piece."""
        plan = self.plan
        repeat, visit, part = self.place(number)
        start = self.source["index"][(*self.list, visit)] * plan.streamed_tile + part * plan.part_rows
        tokens = pl.ds(start, plan.part_rows)
        query_head = 0 if plan.gathered else self.key_head * plan.sharing + repeat
        for name, buffers in self.stage.items():
            ref = self.source[name]
            if name == "rows":
                region = ref.at[self.batch, query_head, :, tokens]
            elif name == plan.streamed_fields:
                region = ref.at[self.batch if ref.shape[0] > 1 else 0, :, tokens]
            else:
                region = ref.at[self.batch, tokens, self.key_head if name in ("k", "v") else query_head]
            plgpu.copy_gmem_to_smem(region, buffers.at[slot], self.filled.at[slot])

    def refill(self, number: jax.Array) -> None:
        """Fills the stage of the step before this one again."""
        if self.stages > 1:
            self.fill(number - 1 + self.stages, number > 0)

    def fill(self, number: jax.Array, unless_first: Any = True) -> None:
        """Fills the stage of a step whose number is `stages` or more once it has been left."""

        @pl.when((self.warpgroup == 0) & unless_first & (number < self.steps))
        def _() -> None:
            slot = jax.lax.rem(number, jnp.int32(self.stages))
            plgpu.barrier_wait(self.emptied.at[slot])
            self.fetch(number, slot)

    def rows(self, row: int) -> jax.Array:
        """A row of `rows` for the own side, from device memory."""
        region = self.source["rows"].at[self.batch, self.head, row, self.tokens]
        return gpu.load(region, plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def sync_warpgroups(self) -> None:
        """Waits until both warpgroups are step."""
        plgpu.barrier_arrive(self.meeting)
        plgpu.barrier_wait(self.meeting)

    def turn(self, carry: Any = ()) -> Any:
        """The end of a warpgroup's turn at the tensor cores, or of its softmax, with what must be done by then;
        where turns are taken."""
        if not self.plan.takes_turns:
            return carry
        if carry:
            carry = jax.lax.optimization_barrier(carry)
        self.sync_warpgroups()
        return carry

    def staged(self, name: str = "weights") -> Any:
        """Where the simulator lays out what products take from registers; None for real."""
        return self.scratch.get(name)

    def store(self, x: jax.Array, name: str, place: Any, head: Any) -> None:
        """Starts the copy of the own rows' result."""
        place[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, self.target[name].at[self.batch, self.tokens, head])

    def store_forward(self, acc: jax.Array, high: jax.Array, total: jax.Array) -> None:
        """o and lse out of weights' sums: `acc` times values and `total`, both relative to 2^high."""
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        inverse = jnp.where(seen, 1.0, 0.0) / total
        out = acc * gpu.along_columns(inverse, self.plan.value_dim)
        self.store(out, "o", self.scratch.get("out", self.resident["q"]), self.head)
        lse = jnp.where(seen, high / LOG2_E + jnp.log(total), -jnp.inf)
        self.target["lse"].at[self.batch, self.head, self.tokens][...] = lse
        plgpu.wait_smem_to_gmem(0)


class PipelineStep:
    """One step: the stage that it reads, and its mask."""

    def __init__(self, pipeline: TilePipeline, number: jax.Array, slot: jax.Array, partial: jax.Array) -> None:
        self.pipeline, self.number, self.is_partial = pipeline, number, partial
        self.stage = {name: ref.at[slot] for name, ref in pipeline.stage.items()}

    def __getitem__(self, name: str) -> Any:
        return self.stage[name]

    def refill(self) -> None:
        """To be called once, where waiting for the other warpgroup costs the least."""
        self.pipeline.refill(self.number)

    def masked(self, scores: jax.Array) -> jax.Array:
        """Scores (own rows, part_rows), -inf where a query does not see a key."""
        pipeline = self.pipeline
        plan = pipeline.plan

        def apply_mask(scores: jax.Array) -> jax.Array:
            rows, columns = scores.shape
            resident, streamed = {}, {}
            for row, name in enumerate(plan.fields):
                resident[name] = gpu.along_columns(
                    gpu.load_per_row(pipeline.resident[plan.resident_fields].at[row]), columns
                )
                streamed[name] = gpu.along_rows(gpu.load_per_column(self[plan.streamed_fields].at[row]), rows)
            query, key = (streamed, resident) if plan.over_queries else (resident, streamed)
            return jnp.where(tile_allows(plan.settings.mask, query, key), scores, -jnp.inf)

        return self._where_partial(apply_mask, scores)

    def masked_gates(self, gates: jax.Array) -> jax.Array:
        """Scores (64,) of a landmark, one a query, -inf where the query does not see the block."""
        pipeline = self.pipeline
        plan = pipeline.plan

        def apply_mask(gates: jax.Array) -> jax.Array:
            query, key = {}, {}
            for row, name in enumerate(plan.fields):
                query[name] = gpu.load_per_row(
                    (self if plan.over_queries else pipeline.resident)["query_fields"].at[row]
                )
                key[name] = (pipeline.resident if plan.over_queries else self)["key_fields"][row, 0]
            return jnp.where(tile_allows(plan.settings.mask, query, key), gates, -jnp.inf)

        return self._where_partial(apply_mask, gates)

    def _where_partial(self, apply_mask: Callable[[jax.Array], jax.Array], scores: jax.Array) -> jax.Array:
        if not self.pipeline.plan.masked:
            return scores
        return jax.lax.cond(self.is_partial == 1, apply_mask, lambda scores: scores, scores)


def _quotient(x: jax.Array, by: int) -> jax.Array:
    return x if by == 1 else jax.lax.div(x, jnp.int32(by))
