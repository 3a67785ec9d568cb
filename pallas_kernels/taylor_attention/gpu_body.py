"""The kernels behind gpu.py: one thread block, one warpgroup, going through the chunks of a row and head for 64 of the
value columns.

The state stays in registers in fp32, transposed, in blocks of 64 features, the last of 32 or 64; products read its bf16
copy in shared memory. Features are made in shared memory, chunk by chunk, out of products with matrices of zeros and
ones (in queries' left one a half for squares), exact in bf16. They lack the weights of packed ones, which are applied
to the state outside, in fp32: with f_k = (k left)(k right) and f_q = (scale q left')(scale q right), ones of constant
and linear features added, f_q . f_k = 1 + s + s^2 / 2.

Copies of the next chunk are in flight while one is computed. What is summed over value columns (dq, dk) is stored in
parts, one per block of columns.

Time may be cut in spans (linear_recurrence/gpu_spans.py). Scans for states alone compute first what every span but the
last adds to the state that the forward scan and the one for dq carry (key_states), or the one for dk and dv
(query_states).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_spans
from recollect.pallas_kernels.linear_recurrence.gpu_spans import CHUNK
from recollect.pallas_kernels.mosaic_gpu import plgpu
from recollect.pallas_kernels.taylor_attention.gpu_plan import (
    COLUMNS,
    DOCUMENT,
    KEEP,
    KEY_DOCUMENT,
    MAPS,
    READ,
    WRITE,
    TaylorPlan,
)

States = tuple[jax.Array, ...]


def launch(plan: TaylorPlan, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the kernel.

    Args:
      inputs: q, k, v, do by the names and sizes of the plan, bf16; the three matrices of MAPS, each (1, features,
        KEY_COLUMNS) bf16, the ones added to left and right factors (2, features) fp32, and 0 to 63 (1, 64) int32; rows
        (b, h, n, rows, 64) fp32; marks (b, n, 5, 64) fp32 if marked, rows READ to KEY_DOCUMENT; initial (b, h, v,
        features) fp32 if one enters, or (b, spans, h, v, features) for several spans. What a scan for states does not
        read is left out.
    """
    staged, space, results = plan.stages(), plan.space(), plan.results()
    names = (list(inputs), list(results), list(staged), list(space))

    def body(*refs: Any) -> None:
        rest = iter(refs)
        source, target, stage, laid = ({name: next(rest) for name in group} for group in names)
        _TaylorBlock(plan, source, target, stage, laid, next(rest), next(rest)).run()

    made = gpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=[
            *staged.values(),
            *space.values(),
            plgpu.Barrier(num_arrivals=len(staged), num_barriers=2),
            plgpu.Barrier(num_arrivals=len(plan.maps)),
        ],
        grid=(plan.splits, plan.heads, plan.b * (plan.spans - plan.states_only)),
        grid_names=("columns", "head", "batch"),
        name=f"taylor_attention_{plan.scan}",
    )(*inputs.values())
    return dict(zip(results, made, strict=True))


class _TaylorBlock:
    """One thread block."""

    def __init__(
        self,
        plan: TaylorPlan,
        source: dict[str, Any],
        target: dict[str, Any],
        stage: dict[str, Any],
        space: dict[str, Any],
        barrier: Any,
        maps_barrier: Any,
    ) -> None:
        self.plan, self.source, self.target, self.stage, self.space = plan, source, target, stage, space
        self.barrier, self.maps_barrier = barrier, maps_barrier
        self.split, self.head, self.batch = (jax.lax.axis_index(name) for name in ("columns", "head", "batch"))
        self.columns = pl.ds(self.split * COLUMNS, COLUMNS)
        self.span, self.batch, self.first, self.count = gpu_spans.place(plan, self.batch)

    def run(self) -> None:
        """All chunks of the span."""
        plan = self.plan
        for name in plan.maps:
            plgpu.copy_gmem_to_smem(self.source[name], self.space[name], self.maps_barrier)
        for step in range(min(2, plan.span)):
            pl.when(step < self.count)(functools.partial(self.fetch, jnp.int32(step), step))
        states = tuple(
            gpu.load(self.state_part(self.source["initial"], block, plan.spans > 1), optimized=False)
            if plan.enters
            else gpu.filled((COLUMNS, block.size), 0.0)
            for block in plan.feature_blocks
        )
        plgpu.barrier_wait(self.maps_barrier)
        states = jax.lax.fori_loop(0, self.count, self.step, states)
        if plan.leaves:

            @pl.when(plan.states_only or (self.first + self.count == plan.n))
            def _() -> None:
                for block, state in zip(plan.feature_blocks, states, strict=True):
                    self.state_part(self.target["state"], block, plan.states_only)[...] = state

        plgpu.wait_smem_to_gmem(0)

    def state_part(self, ref: Any, block: Any, by_span: bool) -> Any:
        """Where a block of a state lies, of this span's state where each span has one."""
        return ref.at[(self.batch, *((self.span,) if by_span else ()), self.head, self.columns, block)]

    def at(self, step: jax.Array) -> jax.Array:
        """The chunk that is of a step of the span."""
        step = self.first + step
        return self.plan.n - 1 - step if self.plan.reverse else step

    def work(self, name: str, block: Any = slice(None)) -> Any:
        """A matrix of the work space, or a block of its features.

        Indexed by a zero that the compiler does not know: where each thread stores would else be worked out for every
        matrix before the first chunk, and kept in a hundred registers.
        """
        return self.space[name].at[(self.zero, block) if name in MAPS else (self.zero, slice(None), block)]

    def fetch(self, step: jax.Array, slot: Any) -> None:
        """Starts the copies of a step's chunk."""
        at = self.at(step)
        for name, buffers in self.stage.items():
            ref = self.source[name]
            if name == "marks":
                chunk = ref.at[self.batch, at]
            elif name == "rows":
                chunk = ref.at[self.batch, self.head, at]
            else:
                columns = slice(None) if name in ("q", "k") else self.columns
                chunk = ref.at[self.batch, pl.ds(at * CHUNK, CHUNK), self.head, columns]
            plgpu.copy_gmem_to_smem(chunk, buffers.at[slot], self.barrier.at[slot])

    def step(self, step: jax.Array, states: States) -> States:
        """One chunk: from the states that enter it to those that leave it."""
        slot = jax.lax.rem(step, jnp.int32(2))
        copied = {name: ref.at[slot] for name, ref in self.stage.items()}
        self.zero = self.space["order"][0, 0]  # see `work`
        if not self.plan.states_only:
            for block, state in zip(self.plan.feature_blocks, states, strict=True):
                self.work("state", block)[...] = state.astype(jnp.bfloat16)
        plgpu.barrier_wait(self.barrier.at[slot])
        if self.plan.scan == "forward":
            self.forward(copied, self.at(step))
        elif self.plan.scan == "queries":
            self.queries(copied, self.at(step))
        elif self.plan.scan == "keys_values":
            self.keys_values(copied, self.at(step))
        elif self.plan.scan == "key_states":
            self.key_features(copied)
        else:
            self.query_features(copied)
        keys, values = self.plan.written
        # Read before the commit, which also keeps the next chunk's copies from overtaking it.
        kept = tuple(state * copied["marks"][KEEP, 0] for state in states) if self.plan.marked else states
        plgpu.commit_smem()
        values_ = gpu.transposed(copied[values])
        states = tuple(
            gpu.mm(values_, self.work(keys, block), state)
            for block, state in zip(self.plan.feature_blocks, kept, strict=True)
        )

        @pl.when(step + 2 < self.count)
        def _() -> None:
            self.fetch(step + 2, slot)

        return states

    def key_features(self, copied: dict[str, Any]) -> None:
        """Lays out those that are written to the state, to be committed."""
        self.features(copied["k"], "key_left", 1.0, "keys", self.per_token(copied, WRITE))

    def query_features(self, copied: dict[str, Any]) -> jax.Array | None:
        """Lays out those that are written to the state's gradient, to be committed: divided by their sums, which is
        easier than dividing do. Returns 1 / sums."""
        inverse = gpu.load_per_row(copied["rows"].at[0]) if self.plan.rows else None
        reads = self.per_token(copied, READ)
        weight = inverse if reads is None else reads if inverse is None else reads * inverse
        self.features(copied["q"], "query_left", self.plan.scale, "queries", weight)
        return inverse

    def forward(self, copied: dict[str, Any], at: jax.Array) -> None:
        """o = (f_q S + w v) / sums."""
        self.key_features(copied)
        self.features(copied["q"], "query_left", self.plan.scale, "queries", self.per_token(copied, READ))
        plgpu.commit_smem()
        # Rounded before they are summed: outputs are true averages, of one value that value.
        weights = self.weights(self.scores(copied), copied).astype(jnp.bfloat16)
        self.work("scores")[...] = weights
        out = self.by_state("queries")
        plgpu.commit_smem()
        out = gpu.mm(self.work("scores"), copied["v"], out)
        tokens = pl.ds(at * CHUNK, CHUNK)
        if self.plan.rows:
            sums = jnp.sum(weights.astype(jnp.float32), axis=1) + gpu.load_per_row(copied["rows"].at[0])
            self.target["sums"].at[self.split, self.batch, self.head, tokens][...] = sums
            out = out / gpu.along_columns(sums, COLUMNS)
        self.leave(out, "o", at)

    def queries(self, copied: dict[str, Any], at: jax.Array) -> None:
        """A part of dq."""
        self.key_features(copied)
        plgpu.commit_smem()
        self.d_scores(copied)
        plgpu.commit_smem()
        dq = gpu.mm(self.work("d_scores"), copied["k"]) * self.plan.scale

        def d_features(block: Any) -> jax.Array:
            product = _by_row(gpu.mm(copied["do"], self.work("state", block)), self.per_token(copied, READ))
            return _by_row(product, gpu.load_per_row(copied["rows"].at[0])) if self.plan.rows else product

        self.part(self.through_features(dq, copied["q"], "query_left", self.plan.scale, d_features), "dq", at)

    def keys_values(self, copied: dict[str, Any], at: jax.Array) -> None:
        """A part of dk, and dv."""
        self.key_features(copied)
        inverse = self.query_features(copied)
        plgpu.commit_smem()
        weights = self.weights(self.scores(copied), copied)
        self.work("scores")[...] = _by_row(weights, inverse).astype(jnp.bfloat16)
        self.d_scores(copied)
        plgpu.commit_smem()
        self.leave(gpu.mm(gpu.transposed(self.work("scores")), copied["do"], self.by_state("keys")), "dv", at)
        dk = gpu.mm(gpu.transposed(self.work("d_scores")), copied["q"]) * self.plan.scale

        def d_features(block: Any) -> jax.Array:
            return _by_row(gpu.mm(copied["v"], self.work("state", block)), self.per_token(copied, WRITE))

        self.part(self.through_features(dk, copied["k"], "key_left", 1.0, d_features), "dk", at)

    def factor(self, x: Any, name: str, scale: float, block: Any) -> jax.Array:
        """One of the two factors of some features, (c, features)."""
        product = gpu.mm(x, gpu.transposed(self.work(name, block))) * scale
        if block.start > 0:
            return product
        ones = gpu.load_per_column(self.space["ones"].at[self.zero + (1 if name == "right" else 0), block])
        return product + gpu.along_rows(ones, CHUNK)

    def features(self, x: Any, left: str, scale: float, to: str, weight: jax.Array | None) -> None:
        """Lays out features, each token's multiplied by its weight, to be committed."""
        for block in self.plan.feature_blocks:
            product = self.factor(x, left, scale, block) * self.factor(x, "right", scale, block)
            self.work(to, block)[...] = _by_row(product, weight).astype(jnp.bfloat16)

    def through_features(self, dx: jax.Array, x: Any, left: str, scale: float, d_features: Any) -> jax.Array:
        """dx and what the features' gradients add to it. No more than two squares are in registers at once."""
        for block in self.plan.feature_blocks:
            by_left, by_right = (self.work(name, pl.ds(0, block.size)) for name in ("by_left", "by_right"))
            d_block = d_features(block) * scale
            by_left[...] = (d_block * self.factor(x, "right", scale, block)).astype(jnp.bfloat16)
            by_right[...] = (d_block * self.factor(x, left, scale, block)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            dx = gpu.mm(by_left, self.work(left, block), dx, (by_right, self.work("right", block)))
        return dx

    def by_state(self, features: str) -> jax.Array:
        """(c, 64): features times the state's copy."""
        return gpu.mm(self.work(features), gpu.transposed(self.work("state")))

    def scores(self, copied: dict[str, Any]) -> jax.Array:
        return gpu.mm(copied["q"], gpu.transposed(copied["k"])) * self.plan.scale

    def weights(self, s: jax.Array, copied: dict[str, Any]) -> jax.Array:
        return self.masked(1.0 + s + 0.5 * s * s, copied)

    def d_scores(self, copied: dict[str, Any]) -> None:
        """Lays out the scores' gradients, to be committed."""
        product = gpu.mm(copied["do"], gpu.transposed(copied["v"]))
        if self.plan.rows:
            inverse, dots = (gpu.load_per_row(copied["rows"].at[row]) for row in (0, 1))
            # g . o is summed over all columns: one of their blocks takes it off.
            product = _by_row(product - gpu.along_columns(dots * jnp.where(self.split == 0, 1.0, 0.0), CHUNK), inverse)
        # Scores once more: that is quicker than keeping them in registers that spill.
        self.work("d_scores")[...] = self.masked(product * (1.0 + self.scores(copied)), copied).astype(jnp.bfloat16)

    def masked(self, pairs: jax.Array, copied: dict[str, Any]) -> jax.Array:
        """(c, c): zero where a query does not see a key."""
        # From shared memory, not counted in registers: the compiler would keep what is the same for all chunks there,
        # and spill.
        order = self.space["order"].at[self.zero]
        earlier = gpu.along_rows(gpu.load_per_column(order), CHUNK) <= gpu.along_columns(gpu.load_per_row(order), CHUNK)
        pairs = jnp.where(earlier, pairs, 0.0)
        if not self.plan.marked:
            return pairs
        of_query, of_key = (
            gpu.load_per_row(copied["marks"].at[DOCUMENT]),
            gpu.load_per_column(copied["marks"].at[KEY_DOCUMENT]),
        )
        return jnp.where(gpu.along_columns(of_query, CHUNK) == gpu.along_rows(of_key, CHUNK), pairs, 0.0)

    def per_token(self, copied: dict[str, Any], row: int) -> jax.Array | None:
        """Each token's read or write; None where all are 1."""
        return gpu.load_per_row(copied["marks"].at[row]) if self.plan.marked else None

    def leave(self, out: jax.Array, name: str, at: jax.Array) -> None:
        """Starts the copy of a chunk's result; what is committed next is the next product's as well."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.work("out")[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            self.work("out"), self.target[name].at[self.batch, pl.ds(at * CHUNK, CHUNK), self.head, self.columns]
        )

    def part(self, x: jax.Array, name: str, at: jax.Array) -> None:
        self.target[name].at[self.split + self.zero, self.batch, pl.ds(at * CHUNK, CHUNK), self.head][...] = x


def _by_row(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    return x if weight is None else x * gpu.along_columns(weight, x.shape[1])
