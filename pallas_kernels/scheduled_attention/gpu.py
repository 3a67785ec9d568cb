"""Mosaic GPU kernels of scheduled attention, for NVIDIA Hopper: forward, dq summed over keys, dk and dv summed over
queries.

gpu_pipeline.py moves tiles through a thread block, gpu_tiles.py and gpu_blocks.py compute on them. Nothing is summed by
two blocks: results have the same bits every time.

Not served: fp32 (Hopper's tensor cores transpose 16-bit operands only), head sizes above `LARGEST_HEAD` and landmark
blocks
above `LARGEST_BLOCK`, whose sums two warpgroups would have to share. Keys of 128 channels with values of 64: outputs
were off by 0.29 on an H100 (2026-11-26; the simulator is right, and so are all other sizes tested), which is not
understood yet.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.scheduled_attention import gpu_blocks, gpu_tiles
from recollect.pallas_kernels.scheduled_attention.block_schedule import Fields, Visits
from recollect.pallas_kernels.scheduled_attention.flash_vjp import AttentionSettings
from recollect.pallas_kernels.scheduled_attention.gpu_pipeline import launch
from recollect.pallas_kernels.scheduled_attention.gpu_plan import LOG2_E, ROWS, GpuPlan

LARGEST_HEAD = 128
LARGEST_BLOCK = ROWS - 1
SHORT_WINDOW = 128
TINY = 1e-30  # a scale that is as good as 0


def refuses(q: Any, k: Any, v: Any, *, block: int | None = None, **rest: Any) -> str | None:
    """Returns why the kernels cannot serve a call, forwards and backwards; None if they can."""
    missing = gpu.unavailable()
    if missing:
        return missing
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            return f"its products take bfloat16; {name} is {x.dtype}"
    for name, x in (("key", k), ("value", v)):
        if x.shape[3] > LARGEST_HEAD:
            return f"a {name} size above {LARGEST_HEAD} does not fit in registers; this one is {x.shape[3]}"
    if k.shape[3] > ROWS >= v.shape[3]:
        return (
            f"with keys of more than {ROWS} channels and values of at most {ROWS} an H100 gave wrong outputs; "
            f"these have {k.shape[3]} and {v.shape[3]}"
        )
    if block is not None and block > LARGEST_BLOCK:
        return f"a landmark block of more than {LARGEST_BLOCK} keys does not fit in registers; this one has {block}"
    return None


def tile_sizes(
    n: int, s: int, k: int, v: int, dtype: Any, *, window: int | None = None, block: int | None = None
) -> tuple[int, int]:
    """Returns the queries and keys per tile: two warpgroups' rows of each, or one's where there are no more, or a
    window so short that most of two would be masked."""
    short = window is not None and window <= SHORT_WINDOW
    query_tile = ROWS if n <= ROWS or short else 2 * ROWS
    if block is not None:
        return query_tile, ROWS
    return query_tile, ROWS if s <= ROWS or short else 2 * ROWS


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    visits: Visits,
    key_heads: jax.Array | None,
    query_fields: Fields,
    key_fields: Fields,
    settings: AttentionSettings,
) -> tuple[jax.Array, jax.Array]:
    """Implements flash_vjp.Kernels."""
    call = _GpuCall("forward", q, k, v, visits, key_heads, query_fields, key_fields, settings, sinks)
    out = launch(call.plan, call.inputs(), call.bodies.forward)
    return out["o"][..., : v.shape[3]], out["lse"]


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    visits: Visits,
    key_heads: jax.Array | None,
    query_fields: Fields,
    key_fields: Fields,
    settings: AttentionSettings,
) -> jax.Array:
    """Implements flash_vjp.Kernels."""
    call = _GpuCall("query_gradient", q, k, v, visits, key_heads, query_fields, key_fields, settings)
    dq = launch(call.plan, call.inputs(do, lse, delta), call.bodies.query_gradient)["dq"][..., : q.shape[3]]
    return -dq if settings.scale < 0 else dq


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    visits: Visits,
    key_heads: jax.Array | None,
    query_fields: Fields,
    key_fields: Fields,
    settings: AttentionSettings,
) -> tuple[jax.Array, jax.Array]:
    """Implements flash_vjp.Kernels."""
    call = _GpuCall("key_gradients", q, k, v, visits, key_heads, query_fields, key_fields, settings)
    out = launch(call.plan, call.inputs(do, lse, delta), call.bodies.key_gradients)
    return out["dk"][..., : k.shape[3]], out["dv"][..., : v.shape[3]]


class _GpuCall:
    """The plan and the inputs of one kernel call."""

    def __init__(self, kernel, q, k, v, visits, key_heads, query_fields, key_fields, settings, sinks=None):
        if settings.scale <= 0:  # masked scores are -inf, which must stay so once scaled
            q = -q if settings.scale < 0 else q
            settings = dataclasses.replace(settings, scale=max(-settings.scale, TINY))
        self.arrays, self.visits, self.key_heads, self.sinks = (q, k, v), visits, key_heads, sinks
        masked = bool(visits.partial.any()) if isinstance(visits.partial, np.ndarray) else True
        names = tuple(query_fields) if masked else ()
        self.fields = {"query_fields": query_fields, "key_fields": key_fields}
        self.bodies: Any = gpu_tiles if settings.block is None else gpu_blocks
        b, n, h, key_dim = q.shape
        self.plan = GpuPlan(
            kernel=kernel,
            settings=settings,
            b=b,
            n=n,
            s=k.shape[1],
            heads=h,
            key_heads=k.shape[2],
            key_dim=gpu.round_up(key_dim, ROWS),
            value_dim=gpu.round_up(v.shape[3], ROWS),
            visits=(visits.count.shape[0], visits.count.shape[1]),
            masked=bool(names),
            fields=names,
            sinks=sinks is not None,
            gathered=key_heads is not None,
            part_rows=ROWS,  # products take 64 at least, and registers hold no more beside the sums
        )

    def inputs(self, do=None, lse=None, delta=None) -> dict[str, jax.Array]:
        q, k, v = self.arrays
        plan = self.plan
        arrays = {
            "q": gpu.pad_last(q, plan.key_dim),
            "k": gpu.pad_last(k, plan.key_dim),
            "v": gpu.pad_last(v, plan.value_dim),
        }
        if do is not None:
            arrays["do"] = gpu.pad_last(do, plan.value_dim)
            arrays["rows"] = jnp.stack([lse * LOG2_E, delta], axis=2)
        arrays |= {name: jnp.asarray(getattr(self.visits, name)) for name in ("count", "index", "partial")}
        if plan.gathered:
            arrays["key_heads"] = self.key_heads
        if self.sinks is not None:
            arrays["sinks"] = self.sinks
        if plan.fields:
            arrays |= {name: _stacked(fields, plan.fields) for name, fields in self.fields.items()}
        return arrays


def _stacked(fields: Fields, names: tuple[str, ...]) -> jax.Array:
    """Returns the fields as one array, (b | 1, fields, tokens) int32."""
    rows = max(x.shape[0] for x in fields.values())
    return jnp.stack(
        [jnp.broadcast_to(jnp.asarray(fields[name]), (rows, fields[name].shape[1])) for name in names], axis=1
    )
