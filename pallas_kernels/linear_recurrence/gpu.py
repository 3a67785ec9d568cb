"""The walks of walks.py as Mosaic GPU kernels, for NVIDIA Hopper."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.linear_recurrence.walks import Chunks, Walked
from pallas_kernels.mosaic_gpu import plgpu

CHUNK = 64
COLUMNS = 64
STAGES = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    b: int
    t: int
    heads: int
    key_dim: int
    value_dim: int
    decay: str
    reverse: bool
    strict: bool
    scale: float
    weighted: bool
    segmented: bool
    entering: bool
    dotted: bool
    checkpoint_every: int | None
    out_dtype: Any

    @property
    def n(self):
        return self.t // CHUNK


def walk(q, k, v, chunks: Chunks, *, heads, scale=1.0, initial_state=None, reverse=False, strict=False, dot_with=None, checkpoint_every=None, out_dtype=None) -> Walked:
    b, t, _, key_dim = q.shape
    value_dim = v.shape[3]
    wide_k, wide_v = gpu.round_up(key_dim, 64), gpu.round_up(value_dim, 64)
    plan = Plan(
        b=b, t=t, heads=heads, key_dim=wide_k, value_dim=wide_v, decay=chunks.decay, reverse=reverse, strict=strict, scale=scale,
        weighted=chunks.decay == "head" or chunks.segments is not None, segmented=chunks.segments is not None,
        entering=initial_state is not None, dotted=dot_with is not None, checkpoint_every=checkpoint_every, out_dtype=jnp.dtype(out_dtype or v.dtype),
    )
    inputs = {"q": gpu.pad_last(q, wide_k), "k": gpu.pad_last(k, wide_k), "v": gpu.pad_last(v, wide_v)}
    if plan.weighted:
        inputs["rows"] = weight_rows(chunks, reverse)
    if plan.segmented:
        inputs["segments"] = chunks.segments
    if plan.dotted:
        inputs["dot_with"] = gpu.pad_last(dot_with, wide_v)
    if plan.entering:
        inputs["initial"] = jnp.pad(initial_state, ((0, 0), (0, 0), (0, wide_k - key_dim), (0, wide_v - value_dim)))
    outs = {"o": jax.ShapeDtypeStruct((b, t, heads, wide_v), plan.out_dtype), "state": jax.ShapeDtypeStruct((b, heads, wide_k, wide_v), jnp.float32)}
    if plan.dotted:
        outs["dots"] = jax.ShapeDtypeStruct((wide_v // COLUMNS, b, heads, t), jnp.float32)
    if checkpoint_every:
        outs["checkpoints"] = jax.ShapeDtypeStruct((b, heads, -(-plan.n // checkpoint_every), wide_k, wide_v), jnp.float32)
    out = launch(plan, inputs, outs)
    cut = slice(None, key_dim), slice(None, value_dim)
    return Walked(
        o=out["o"][..., :value_dim],
        state=out["state"][(..., *cut)],
        dots=jnp.sum(out["dots"], axis=0) if plan.dotted else None,
        checkpoints=out["checkpoints"][(..., *cut)] if checkpoint_every else None,
    )


def weight_rows(chunks, reverse):
    segments = chunks.segments
    if chunks.total is None or chunks.decay != "head":
        b, t = segments.shape
        total = jnp.zeros((b, 1, t // CHUNK, CHUNK), jnp.float32)
    else:
        b, h, t = chunks.total.shape
        total = chunks.total.reshape(b, h, t // CHUNK, CHUNK)
    last = total[..., -1:]
    to_start, to_end, keep = jnp.exp(total), jnp.exp(last - total), jnp.exp(last)
    if segments is not None:
        n = t // CHUNK
        to_start = to_start * chunks.starts.reshape(b, 1, n, CHUNK)
        to_end = to_end * chunks.ends.reshape(b, 1, n, CHUNK)
        keep = keep * chunks.keeps.reshape(b, 1, n, 1)
    reads, writes = (to_end, to_start) if reverse else (to_start, to_end)
    return jnp.stack([total, reads, writes, jnp.broadcast_to(keep, total.shape)], axis=3)


def launch(plan, inputs, outs):
    names = list(inputs)
    staged = {
        "q": gpu.tiled((STAGES, CHUNK, plan.key_dim), jnp.bfloat16),
        "k": gpu.tiled((STAGES, CHUNK, plan.key_dim), jnp.bfloat16),
        "v": gpu.tiled((STAGES, CHUNK, COLUMNS), jnp.bfloat16),
    }
    if plan.weighted:
        staged["rows"] = gpu.plain((STAGES, 4, CHUNK), jnp.float32)
    if plan.segmented:
        staged["segments"] = gpu.plain((STAGES, CHUNK), jnp.int32)
    if plan.dotted:
        staged["dot_with"] = gpu.tiled((STAGES, CHUNK, COLUMNS), inputs["dot_with"].dtype)
    scratch = {
        "state": gpu.tiled((plan.key_dim, COLUMNS), jnp.bfloat16),
        "scores": gpu.tiled((CHUNK, CHUNK), jnp.bfloat16),
        "written": gpu.tiled((CHUNK, COLUMNS), jnp.bfloat16),
        "out": gpu.tiled((CHUNK, COLUMNS), plan.out_dtype),
    }
    barrier = plgpu.Barrier(num_arrivals=len(staged), num_barriers=STAGES)

    def body(*refs):
        refs = list(refs)
        take = lambda keys: {key: refs.pop(0) for key in keys}
        from_, to, stage, space = take(names), take(outs), take(staged), take(scratch)
        _body(plan, from_, to, stage, space, refs.pop(0))

    results = gpu.kernel(
        body, out_type=list(outs.values()), scratch_types=[*staged.values(), *scratch.values(), barrier],
        grid=(plan.value_dim // COLUMNS, plan.heads, plan.b), grid_names=("columns", "head", "batch"), name="linear_recurrence_walk",
    )(*inputs.values())
    return dict(zip(outs, results, strict=True))


def _body(plan, from_, to, stage, space, barrier):
    split, head, batch = (jax.lax.axis_index(name) for name in ("columns", "head", "batch"))
    columns = pl.ds(split * COLUMNS, COLUMNS)
    n = plan.n

    def place(step):
        return n - 1 - step if plan.reverse else step

    def source(name, at):
        ref = from_[name]
        tokens = pl.ds(at * CHUNK, CHUNK)
        if name == "segments":
            return ref.at[batch, tokens]
        if name == "rows":
            return ref.at[batch, head if ref.shape[1] > 1 else 0, at]
        its = jax.lax.div(head, jnp.int32(plan.heads // ref.shape[2]))
        if name in ("q", "k"):
            return ref.at[batch, tokens, its]
        return ref.at[batch, tokens, its, columns]

    def fetch(step, slot):
        for name, buffers in stage.items():
            plgpu.copy_gmem_to_smem(source(name, place(step)), buffers.at[slot], barrier.at[slot])

    for step in range(min(STAGES, n)):
        fetch(jnp.int32(step), step)

    state = gpu.load(from_["initial"].at[batch, head, :, columns], optimized=False) if plan.entering else gpu.filled((plan.key_dim, COLUMNS), 0.0)

    def step_(step, state):
        slot = jax.lax.rem(step, jnp.int32(STAGES))
        at = place(step)
        here = {name: ref.at[slot] for name, ref in stage.items()}
        if plan.checkpoint_every is not None:
            every = plan.checkpoint_every
            enters = (at == n - 1) | (jax.lax.rem(at, jnp.int32(every)) == every - 1) if plan.reverse else jax.lax.rem(at, jnp.int32(every)) == 0

            @pl.when(enters)
            def _():
                to["checkpoints"].at[batch, head, jax.lax.div(at, jnp.int32(every)), :, columns][...] = state

        space["state"][...] = state.astype(jnp.bfloat16)
        plgpu.barrier_wait(barrier.at[slot])
        if plan.weighted:
            rows = here["rows"]
            keep = rows[3, 0]
            written = gpu.load(here["v"]).astype(jnp.float32) * gpu.along_columns(gpu.load_per_row(rows.at[2]), COLUMNS)
            space["written"][...] = written.astype(jnp.bfloat16)
        plgpu.commit_smem()
        scores = gpu.mm(here["q"], gpu.transposed(here["k"]))
        space["scores"][...] = weigh(plan, scores, here).astype(jnp.bfloat16)
        plgpu.commit_smem()
        if plan.weighted:
            out = gpu.mm(here["q"], space["state"]) * gpu.along_columns(gpu.load_per_row(rows.at[1]), COLUMNS)
            out = gpu.mm(space["scores"], here["v"], out)
        else:
            out = gpu.mm(here["q"], space["state"], None, (space["scores"], here["v"]))
        if plan.scale != 1.0:
            out = out * plan.scale
        if plan.dotted:
            dots = jnp.sum(out * gpu.load(here["dot_with"]).astype(jnp.float32), axis=1)
            to["dots"].at[split, batch, head, pl.ds(at * CHUNK, CHUNK)][...] = dots
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        space["out"][...] = out.astype(plan.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(space["out"], to["o"].at[batch, pl.ds(at * CHUNK, CHUNK), head, columns])
        if plan.weighted:
            state = gpu.mm(gpu.transposed(here["k"]), space["written"], state * keep)
        else:
            state = gpu.mm(gpu.transposed(here["k"]), here["v"], state)

        @pl.when(step + STAGES < n)
        def _():
            fetch(step + STAGES, slot)

        return state

    state = jax.lax.fori_loop(0, n, step_, state)
    to["state"].at[batch, head, :, columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def weigh(plan, scores, here):
    row, column = gpu.row_and_column((CHUNK, CHUNK))
    if plan.reverse:
        seen = column > row if plan.strict else column >= row
    else:
        seen = column < row if plan.strict else column <= row
    if plan.segmented:
        mine = jax.lax.broadcast_in_dim(gpu.load_per_row(here["segments"]), (CHUNK, CHUNK), (0,))
        theirs = jax.lax.broadcast_in_dim(gpu.load_per_column(here["segments"]), (CHUNK, CHUNK), (1,))
        seen = seen & (mine == theirs)
    if plan.decay != "head":
        return jnp.where(seen, scores, 0.0)
    difference = gpu.along_columns(gpu.load_per_row(here["rows"].at[0]), CHUNK) - gpu.along_rows(gpu.load_per_column(here["rows"].at[0]), CHUNK)
    return scores * jnp.exp(jnp.where(seen, -difference if plan.reverse else difference, -jnp.inf))
