"""Spans of time, which fill a GPU where rows and heads are few: each has thread blocks of its own.

A first launch computes the state that each span adds, starting from 0; those are combined
(sequence_parallel.entering_states), and a second launch scans all spans at once from the states that truly enter them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.tuning import Key, Sizes, block_sizes

CHUNK = gpu.ROWS
SHORTEST_SPAN = 1024
"""Tokens: below, a span's own work does not hide what combining the spans costs."""
CORES = 132


class InSpans:
    """A mixin for what kernels are built for: t tokens in `spans` spans, the last maybe of fewer chunks. Functions here
    also read its b, heads, splits (of columns), reverse, and states_only: whether this is the first launch, of all
    spans but the last."""

    t: int
    spans: int

    @property
    def n(self) -> int:
        """Chunks."""
        return self.t // CHUNK

    @property
    def span(self) -> int:
        """Chunks of a span, in the order of the scan."""
        return -(-self.n // self.spans)


def spans_to_fill(blocks: int, t: int) -> int:
    """Returns into how many spans a scan of t tokens with so many thread blocks is cut: as many as the cores can take
    at once."""
    return max(1, min(CORES // blocks, t // SHORTEST_SPAN))


def default_spans(b: int, t: int, h: int, v: int) -> Sizes:
    """Returns the spans of a call that no tuning table names."""
    return {"spans": spans_to_fill(b * h * -(-v // 64), t)}


def candidates(key: Key) -> Iterable[Sizes]:
    """Returns the counts of spans that tuning measures."""
    return [{"spans": count} for count in (1, 2, 4, 8, 16, 32) if count * 512 <= int(key["t"])]


def cut(kernel: str, plan: Any, value_dim: int) -> Any:
    """Returns the plan in as many spans as the table of `kernel` says or fill the device; none is empty."""
    sizes = block_sizes(
        kernel,
        lambda **_: {"spans": spans_to_fill(plan.b * plan.heads * plan.splits, plan.t)},
        b=plan.b,
        t=plan.t,
        h=plan.heads,
        v=value_dim,
    )
    span = -(-plan.n // min(sizes["spans"], plan.n))
    return dataclasses.replace(plan, spans=-(-plan.n // span))


def by_span(plan: Any, x: jax.Array) -> jax.Array:
    """Returns a value per chunk (b, n, ...) as (b, spans - 1, span, ...), without the last span, in the scan's
    order."""
    x = jnp.flip(x, axis=1) if plan.reverse else x
    return x[:, : (plan.spans - 1) * plan.span].reshape(x.shape[0], plan.spans - 1, plan.span, *x.shape[2:])


def place(plan: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
    """Returns a thread block's span, its batch row, the scan's step with which the span begins, and its chunks.

    batch: the block's index along the grid's axis of batch rows and spans.
    """
    if plan.spans == 1:
        return 0, batch, 0, plan.span
    launched = jnp.int32(plan.spans - plan.states_only)
    span, batch = jax.lax.rem(batch, launched), jax.lax.div(batch, launched)
    first, count = span * plan.span, plan.span
    if not plan.states_only and plan.n % plan.span:
        count = jnp.minimum(plan.n - first, plan.span)
    return span, batch, first, count
