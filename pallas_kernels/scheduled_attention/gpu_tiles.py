"""The bodies of the three Mosaic GPU kernels of scheduled attention, over gpu_walk.py's pieces.

Scores are in units of log 2 once scaled, so that weights are powers of two. Weights go into their product from
registers.

Tensor cores and exponentials should be busy at once. At head sizes to 64 the forward pass and dq as a rule take no more
than 128 registers, so that a core holds two thread blocks of two warpgroups; above, the forward pass' two warpgroups
take turns (gpu_plan.py). Times: docs/gpu_measured.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.mosaic_gpu import plgpu
from recollect.pallas_kernels.scheduled_attention.gpu_pipeline import PipelineStep, TilePipeline
from recollect.pallas_kernels.scheduled_attention.gpu_plan import LOG2_E, ROWS

LOWEST = -1e30
"""In place of -inf where a maximum is subtracted: finite, so that what is masked everywhere gets weights of 0 and
not NaN."""


def forward(pipeline: TilePipeline) -> None:
    """o and lse, by the online softmax."""
    plan = pipeline.plan
    unit = plan.unit
    low = jnp.float32(LOWEST)
    first = jnp.maximum(pipeline.source["sinks"][pipeline.head] * LOG2_E, low) if plan.sinks else low
    total = jnp.exp2(pipeline.source["sinks"][pipeline.head] * LOG2_E - first) if plan.sinks else jnp.float32(0)
    high, total = (gpu.per_row(jnp.full((ROWS,), x, jnp.float32)) for x in (first, total))

    left: list[Any] = []

    def load() -> None:
        # Products of 64 keys with both operands in shared memory take all that it gives; queries in registers halve
        # that.
        registers = max(plan.key_dim, plan.value_dim) > 64 and dispatch.interpretation() is None
        left.append(gpu.load(pipeline.resident["q"]) if registers else pipeline.resident["q"])

    def accumulate(step: PipelineStep, carry):
        acc, high, total = carry
        scores = step.masked(gpu.mm(left[0], gpu.transposed(step["k"]), meanwhile=pipeline.turn))
        higher = jnp.maximum(high, jnp.max(scores, axis=1) * unit)
        weights = jnp.exp2(scores * unit - gpu.along_columns(higher, plan.part_rows))
        shrink = jnp.exp2(high - higher)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * gpu.along_columns(shrink, plan.value_dim)
        acc, higher, total, weights = pipeline.turn((acc, higher, total, weights.astype(jnp.bfloat16)))
        acc = gpu.mm_registers(weights, step["v"], acc, pipeline.staged(), step.refill)
        return acc, higher, total

    acc, high, total = pipeline.run(accumulate, (gpu.filled((ROWS, plan.value_dim), 0.0), high, total), load)
    pipeline.store_forward(acc, high, total)


def query_gradient(pipeline: TilePipeline) -> None:
    """dq."""
    plan = pipeline.plan
    lse, delta = (pipeline.rows(row) for row in (0, 1))

    def accumulate(step: PipelineStep, dq):
        def weigh(scores):
            return jnp.exp2(step.masked(scores) * plan.unit - gpu.along_columns(lse, plan.part_rows))

        scores, values = (
            (pipeline.resident["q"], gpu.transposed(step["k"])),
            (pipeline.resident["do"], gpu.transposed(step["v"])),
        )
        if max(plan.key_dim, plan.value_dim) <= 64:  # 128 registers are enough then: two thread blocks a core
            weights, dots = weigh(gpu.mm(*scores)), gpu.mm(*values)
        else:
            weights, dots = gpu.mm_while(scores, values, weigh)
        d_scores = (weights * (dots - gpu.along_columns(delta, plan.part_rows))).astype(jnp.bfloat16)
        return gpu.mm_registers(d_scores, step["k"], dq, pipeline.staged(), step.refill)

    dq = pipeline.run(accumulate, gpu.filled((ROWS, plan.key_dim), 0.0)) * plan.settings.scale
    pipeline.store(dq, "dq", pipeline.resident["q"], pipeline.head)
    plgpu.wait_smem_to_gmem(0)


def key_gradients(pipeline: TilePipeline) -> None:
    """dk and dv; scores are turned, a row a key."""
    plan = pipeline.plan

    def accumulate(step: PipelineStep, carry):
        dk, dv = carry
        # Both products at once would fill the registers that masks need.
        weights = _turned_weights(step, gpu.mm(pipeline.resident["k"], gpu.transposed(step["q"])))
        values = (pipeline.resident["v"], gpu.transposed(step["do"]))
        dv, dots = gpu.mm_beside(weights.astype(jnp.bfloat16), step["do"], dv, values, pipeline.staged(), step.refill)
        d_scores = weights * (dots - gpu.along_rows(gpu.load_per_column(step["rows"].at[1]), ROWS))
        dk = gpu.mm_registers(d_scores.astype(jnp.bfloat16), step["q"], dk, pipeline.staged("d_scores"))
        return dk, dv

    zeros = tuple(gpu.filled((ROWS, size), 0.0) for size in (plan.key_dim, plan.value_dim))
    dk, dv = pipeline.run(accumulate, zeros)
    pipeline.store(dk * plan.settings.scale, "dk", pipeline.resident["k"], pipeline.key_head)
    pipeline.store(dv, "dv", pipeline.resident["v"], pipeline.key_head)
    plgpu.wait_smem_to_gmem(0)


def _turned_weights(step: PipelineStep, scores: jax.Array) -> jax.Array:
    """exp(s - lse) from products (keys, queries)."""
    lse = gpu.along_rows(gpu.load_per_column(step["rows"].at[0]), ROWS)
    return jnp.exp2(step.masked(scores) * step.pipeline.plan.unit - lse)
