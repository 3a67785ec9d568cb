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
from recollect.pallas_kernels.scheduled_attention.gpu_pipeline import Here, Walk
from recollect.pallas_kernels.scheduled_attention.gpu_plan import ROWS, Plan
from recollect.pallas_kernels.scheduled_attention.gpu_tiles import LOWEST


def forward(walk: Walk) -> None:
    """o and lse, by the online softmax over landmarks."""
    plan = walk.plan

    def step(here: Here, carry):
        acc, high, total = carry
        _, gates, exponentials, sums = _inner(
            plan, gpu.mm(walk.own["q"], gpu.transposed(here["k"]), meanwhile=walk.turn)
        )
        gates = here.masked_gates(gates)
        higher = jnp.maximum(high, gates)
        shares, shrink = jnp.exp2(gates - higher), jnp.exp2(high - higher)
        weights = exponentials * gpu.along_columns(shares / sums, plan.piece)
        acc = acc * gpu.along_columns(shrink, plan.value_dim)
        total = total * shrink + shares
        acc, higher, total, weights = walk.turn((acc, higher, total, weights.astype(jnp.bfloat16)))
        acc = gpu.mm_registers(weights, here["v"], acc, walk.staged(), here.refill)
        return acc, higher, total

    high, total = (gpu.per_row(jnp.full((ROWS,), x, jnp.float32)) for x in (LOWEST, 0.0))
    acc, high, total = walk.run(step, (gpu.filled((ROWS, plan.value_dim), 0.0), high, total))
    walk.leave_forward(acc, high, total)


def query_gradient(walk: Walk) -> None:
    """dq."""
    plan = walk.plan
    lse, delta = (walk.rows(row) for row in (0, 1))

    def step(here: Here, dq):
        scores, values = (walk.own["q"], gpu.transposed(here["k"])), (walk.own["do"], gpu.transposed(here["v"]))
        inner, dots = gpu.mm_while(scores, values, lambda scores: _inner(plan, scores))
        is_landmark, gates, exponentials, sums = inner
        shares = jnp.exp2(here.masked_gates(gates) - lse)
        inner_weights = exponentials * gpu.along_columns(1.0 / sums, plan.piece)
        averages = jnp.sum(inner_weights * dots, axis=1)
        d_scores = _d_scores(is_landmark, inner_weights, dots, shares, averages, delta)
        return gpu.mm_registers(d_scores.astype(jnp.bfloat16), here["k"], dq, walk.staged(), here.refill)

    dq = walk.run(step, gpu.filled((ROWS, plan.key_dim), 0.0))
    walk.leave(dq * plan.settings.scale, "dq", walk.own["q"], walk.head)
    plgpu.wait_smem_to_gmem(0)


def key_gradients(walk: Walk) -> None:
    """dk and dv."""
    plan = walk.plan

    def step(here: Here, carry):
        dk, dv = carry
        is_landmark, gates, exponentials, sums = _inner(plan, gpu.mm(here["q"], gpu.transposed(walk.own["k"])))
        shares = jnp.exp2(here.masked_gates(gates) - gpu.load_per_row(here["rows"].at[0]))
        inner_weights = exponentials * gpu.along_columns(1.0 / sums, ROWS)
        walk.space["weights"][...] = (inner_weights * gpu.along_columns(shares, ROWS)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        weights, values = gpu.transposed(walk.space["weights"]), (here["do"], gpu.transposed(walk.own["v"]))
        dv, dots = gpu.mm_beside(weights, here["do"], dv, values, meanwhile=here.refill)
        averages = jnp.sum(inner_weights * dots, axis=1)
        delta = gpu.load_per_row(here["rows"].at[1])
        place = walk.space["weights"]
        place[...] = _d_scores(is_landmark, inner_weights, dots, shares, averages, delta).astype(jnp.bfloat16)
        plgpu.commit_smem()
        dk = gpu.mm(gpu.transposed(place), here["q"], dk)
        return dk, dv

    dk, dv = walk.run(step, tuple(gpu.filled((ROWS, size), 0.0) for size in (plan.key_dim, plan.value_dim)))
    walk.leave(dk * plan.settings.scale, "dk", walk.own["k"], walk.key_head)
    walk.leave(dv, "dv", walk.own["v"], walk.key_head)
    plgpu.wait_smem_to_gmem(0)


def _inner(plan: Plan, scores: jax.Array) -> tuple[jax.Array, ...]:
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
