"""What a TPU kernel does with a tile of queries and a tile of keys.

Scores lie transposed, keys down and queries across: whatever there is one of a query (maximum, sum, log-sum-exp, delta)
is a row, sums over keys go down the sublanes, which takes additions of whole registers where sums along lanes take
shuffles, and a landmark block's softmax is one over consecutive sublanes. The output and dq are collected transposed as
well, so that narrow heads waste no lanes, and are turned once, at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from recollect.pallas_kernels.scheduled_attention.block_schedule import tile_allows
from recollect.pallas_kernels.scheduled_attention.flash_vjp import AttentionSettings
from recollect.pallas_kernels.scheduled_attention.tpu_grid import FIRST, LAST, MASKED, VISITED, VisitList

LOWEST = -1e30
"""Where maxima start: finite, so that exp(-inf - maximum) is 0 where a query has seen nothing yet."""


@dataclasses.dataclass(frozen=True)
class TileContext:
    """What kernels know when they are traced.

    names: of the fields, in the order of the rows that hold them. blocks: where keys come in landmark blocks, how many
    a tile of keys holds (one with settings.key_tile slots each); of_blocks: how many there are in all, beyond which a
    tile holds nothing.
    """

    settings: AttentionSettings
    visit_list: VisitList
    dtype: Any
    names: tuple[str, ...]
    blocks: int = 1
    of_blocks: int | None = None

    @property
    def key_rows(self) -> int:
        return self.blocks * self.settings.key_tile

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """The product of two matrices over the given axes, fp32; operands rounded to the inputs' dtype."""
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        dimensions = (((over[0],), (over[1],)), ((), ()))
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            dimensions,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """(keys, queries) fp32."""
        return self.settings.scale * self.dot(k, q, (1, 1))

    def allowed(self, query_fields: Any, key_fields: Any, number: Any) -> jax.Array:
        """(keys, queries) bool or, of landmark blocks, (blocks, 1, queries). The mask is asked with queries across and
        keys down: fields only have
        to broadcast. number: the tile's of keys."""
        query = {name: query_fields[0, 0, i : i + 1] for i, name in enumerate(self.names)}
        key = {name: _column(key_fields[0, 0, i : i + 1]) for i, name in enumerate(self.names)}
        if self.settings.block is None:
            return jnp.broadcast_to(
                tile_allows(self.settings.mask, query, key), (self.key_rows, self.settings.query_tile)
            )
        query, key = ({name: x.reshape(x.shape[0], 1, x.shape[1]) for name, x in side.items()} for side in (query, key))
        allowed = jnp.broadcast_to(
            tile_allows(self.settings.mask, query, key), (self.blocks, 1, self.settings.query_tile)
        )
        if self.of_blocks is not None:
            allowed &= lax.broadcasted_iota(jnp.int32, allowed.shape, 0) < self.of_blocks - number * self.blocks
        return allowed

    def visit(self, step: Any, body: Any) -> None:
        """Runs body(whether by the mask) where a tile is visited, of both kinds those that there are."""
        for masked, present in ((True, self.visit_list.masked), (False, self.visit_list.unmasked)):
            if present:

                @pl.when(step & (VISITED | MASKED) == (VISITED | MASKED if masked else VISITED))
                def _(masked=masked):
                    body(masked)


def _column(row: jax.Array) -> jax.Array:
    return row.reshape(row.shape[1], 1)


def starts(step: Any) -> Any:
    """Whether it is the first of its own tile's steps."""
    return step & FIRST != 0


def ends(step: Any) -> Any:
    """Whether it is the last of its own tile's steps."""
    return step & LAST != 0


class OnlineSoftmax:
    """The softmax over the keys seen so far, of every query of a tile: maximum and sum (1, queries), and the
    weighted sum of values (v, queries)."""

    def __init__(self, maximum: Any, total: Any, output: Any):
        self.maximum, self.total, self.output = maximum, total, output

    def start(self, sink: Any) -> None:
        """sink: a logit, or None."""
        shape = self.maximum.shape
        first = (
            jnp.full(shape, LOWEST, jnp.float32)
            if sink is None
            else jnp.maximum(jnp.full(shape, sink, jnp.float32), LOWEST)
        )
        self.maximum[...] = first
        self.total[...] = jnp.zeros(shape, jnp.float32) if sink is None else jnp.exp(sink - first)
        self.output[...] = jnp.zeros(self.output.shape, jnp.float32)

    def raise_maximum(self, highest: jax.Array) -> jax.Array:
        """Takes the maximum to at least `highest`, what was summed with it; returns the maximum."""
        before = self.maximum[...]
        maximum = jnp.maximum(before, highest)
        keep = jnp.exp(before - maximum)
        self.maximum[...] = maximum
        self.total[...] *= keep
        self.output[...] *= keep
        return maximum

    def result(self) -> tuple[jax.Array, jax.Array]:
        """(queries, v) and the log-sum-exp (1, queries); 0 and -inf where nothing was seen."""
        total = self.total[...]
        some = total > 0
        total = jnp.where(some, total, 1)
        output = jnp.where(some, self.output[...] / total, 0)
        return output.T, jnp.where(some, self.maximum[...] + jnp.log(total), -jnp.inf)


def update(
    context: TileContext, state: OnlineSoftmax, q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None
) -> None:
    """Takes a tile of keys into the softmax."""
    s = context.scores(q, k)
    if context.settings.block is None:
        s = _masked(s, allowed)
        weights = jnp.exp(s - state.raise_maximum(jnp.max(s, axis=0, keepdims=True)))
        state.total[...] += jnp.sum(weights, axis=0, keepdims=True)
    else:
        inside = BlockSoftmax(context, s)
        gates = _masked(inside.gates, allowed)
        shares = jnp.exp(gates - state.raise_maximum(jnp.max(gates, axis=0)))
        state.total[...] += jnp.sum(shares, axis=0)
        weights = (inside.raw * (shares / inside.sums)).reshape(s.shape)
    state.output[...] += context.dot(v, weights, (0, 0))


def weights_and_score_gradients(
    context: TileContext,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    allowed: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Weights and the gradient by scores, (keys, queries) fp32."""
    s, dots = context.scores(q, k), context.dot(v, do, (1, 1))
    if context.settings.block is None:
        weights = jnp.exp(_masked(s, allowed) - lse)
        return weights, weights * (dots - delta)
    inside = BlockSoftmax(context, s)
    shares = jnp.exp(_masked(inside.gates, allowed) - lse)
    averages = jnp.sum(inside.raw * dots.reshape(inside.raw.shape), axis=1, keepdims=True) / inside.sums
    weights = inside.raw * (shares / inside.sums)
    d_scores = weights * (dots.reshape(weights.shape) - averages)
    d_scores = jnp.where(inside.slots == context.settings.block, shares * (averages - delta), d_scores)
    return weights.reshape(s.shape), d_scores.reshape(s.shape)


class BlockSoftmax:
    """Scores (keys, queries) by landmark block: the landmarks' `gates` (blocks, 1, queries), and inside each block a
    softmax over its ordinary keys as `raw` (blocks, slots, queries), 0 elsewhere, by `sums` (blocks, 1, queries).
    slots: the number of each slot."""

    def __init__(self, context: TileContext, s: jax.Array):
        block = context.settings.block
        assert block is not None
        scores = s.reshape(context.blocks, context.settings.key_tile, s.shape[1])
        self.slots = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        self.gates = scores[:, block : block + 1]
        ordinary = jnp.where(self.slots < block, scores, -jnp.inf)
        self.raw = jnp.exp(ordinary - jnp.max(ordinary, axis=1, keepdims=True))
        self.sums = jnp.sum(self.raw, axis=1, keepdims=True)


def _masked(s: jax.Array, allowed: jax.Array | None) -> jax.Array:
    return s if allowed is None else jnp.where(allowed, s, -jnp.inf)
