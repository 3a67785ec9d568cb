"""The bodies of the three Mosaic GPU kernels where keys come in landmark blocks, one a tile (core.py's docstring has
the equations).

A block's inner softmax is a matter of rows: of its ordinary columns' maximum and sum, and of its landmark's column. So
scores keep a row a query in the gradients of keys too, where weights are turned on their way through shared memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.mosaic_gpu import plgpu
from recollect.pallas_kernels.scheduled_attention.gpu_pipeline import PipelineStep, TilePipeline
from recollect.pallas_kernels.scheduled_attention.gpu_plan import ROWS, GpuPlan
from recollect.pallas_kernels.scheduled_attention.gpu_tiles import LOWEST


def forward(pipeline: TilePipeline) -> None:
    """o and lse, by the online softmax over landmarks."""
    plan = pipeline.plan

    def accumulate(step: PipelineStep, carry):
        acc, high, total = carry
        _, gates, exponentials, sums = _inner(
            plan, gpu.mm(pipeline.resident["q"], gpu.transposed(step["k"]), meanwhile=pipeline.turn)
        )
        gates = step.masked_gates(gates)
        higher = jnp.maximum(high, gates)
        shares, shrink = jnp.exp2(gates - higher), jnp.exp2(high - higher)
        weights = exponentials * gpu.along_columns(shares / sums, plan.part_rows)
        acc = acc * gpu.along_columns(shrink, plan.value_dim)
        total = total * shrink + shares
        acc, higher, total, weights = pipeline.turn((acc, higher, total, weights.astype(jnp.bfloat16)))
        acc = gpu.mm_registers(weights, step["v"], acc, pipeline.staged(), step.refill)
        return acc, higher, total

    high, total = (gpu.per_row(jnp.full((ROWS,), x, jnp.float32)) for x in (LOWEST, 0.0))
    acc, high, total = pipeline.run(accumulate, (gpu.filled((ROWS, plan.value_dim), 0.0), high, total))
    pipeline.store_forward(acc, high, total)


def query_gradient(pipeline: TilePipeline) -> None:
    """dq."""
    plan = pipeline.plan
    lse, delta = (pipeline.rows(row) for row in (0, 1))

    def accumulate(step: PipelineStep, dq):
        scores, values = (
            (pipeline.resident["q"], gpu.transposed(step["k"])),
            (pipeline.resident["do"], gpu.transposed(step["v"])),
        )
        inner, dots = gpu.mm_while(scores, values, lambda scores: _inner(plan, scores))
        is_landmark, gates, exponentials, sums = inner
        shares = jnp.exp2(step.masked_gates(gates) - lse)
        inner_weights = exponentials * gpu.along_columns(1.0 / sums, plan.part_rows)
        averages = jnp.sum(inner_weights * dots, axis=1)
        d_scores = _d_scores(is_landmark, inner_weights, dots, shares, averages, delta)
        return gpu.mm_registers(d_scores.astype(jnp.bfloat16), step["k"], dq, pipeline.staged(), step.refill)

    dq = pipeline.run(accumulate, gpu.filled((ROWS, plan.key_dim), 0.0))
    pipeline.store(dq * plan.settings.scale, "dq", pipeline.resident["q"], pipeline.head)
    plgpu.wait_smem_to_gmem(0)


def key_gradients(pipeline: TilePipeline) -> None:
    """dk and dv."""
    plan = pipeline.plan

    def accumulate(step: PipelineStep, carry):
        dk, dv = carry
        is_landmark, gates, exponentials, sums = _inner(plan, gpu.mm(step["q"], gpu.transposed(pipeline.resident["k"])))
        shares = jnp.exp2(step.masked_gates(gates) - gpu.load_per_row(step["rows"].at[0]))
        inner_weights = exponentials * gpu.along_columns(1.0 / sums, ROWS)
        pipeline.scratch["weights"][...] = (inner_weights * gpu.along_columns(shares, ROWS)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        weights, values = (
            gpu.transposed(pipeline.scratch["weights"]),
            (step["do"], gpu.transposed(pipeline.resident["v"])),
        )
        dv, dots = gpu.mm_beside(weights, step["do"], dv, values, meanwhile=step.refill)
        averages = jnp.sum(inner_weights * dots, axis=1)
        delta = gpu.load_per_row(step["rows"].at[1])
        place = pipeline.scratch["weights"]
        place[...] = _d_scores(is_landmark, inner_weights, dots, shares, averages, delta).astype(jnp.bfloat16)
        plgpu.commit_smem()
        dk = gpu.mm(gpu.transposed(place), step["q"], dk)
        return dk, dv

    dk, dv = pipeline.run(accumulate, tuple(gpu.filled((ROWS, size), 0.0) for size in (plan.key_dim, plan.value_dim)))
    pipeline.store(dk * plan.settings.scale, "dk", pipeline.resident["k"], pipeline.key_head)
    pipeline.store(dv, "dv", pipeline.resident["v"], pipeline.key_head)
    plgpu.wait_smem_to_gmem(0)


def _inner(plan: GpuPlan, scores: jax.Array) -> tuple[jax.Array, ...]:
    """Of scores (64, slots): whether a slot is the landmark's, the landmark's score per row, the exponentials of the
    ordinary slots less their maximum per row (0 elsewhere), and their sums."""
    block = plan.settings.block
    assert block is not None
    column = gpu.row_and_column((ROWS, scores.shape[1]))[1]
    is_landmark = column == block
    ordinary = jnp.where(column < block, scores * plan.unit, -jnp.inf)
    high = jnp.max(ordinary, axis=1)
    exponentials = jnp.exp2(ordinary - gpu.along_columns(high, scores.shape[1]))
    gates = jnp.sum(jnp.where(is_landmark, scores, 0.0), axis=1) * plan.unit
    return is_landmark, gates, exponentials, jnp.sum(exponentials, axis=1)


def _d_scores(is_landmark, inner_weights, dots, shares, averages, delta) -> jax.Array:
    """ds: P n (g . v - D) of ordinary slots, P (D - delta) of the landmark."""
    columns = dots.shape[1]
    ordinary = inner_weights * (dots - gpu.along_columns(averages, columns))
    landmark = jnp.where(is_landmark, gpu.along_columns(averages - delta, columns), 0.0)
    return gpu.along_columns(shares, columns) * (ordinary + landmark)
