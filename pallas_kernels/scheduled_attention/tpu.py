"""Mosaic TPU kernels of scheduled attention: forward, dq walking over keys, dk and dv walking over queries.

A program walks one list of visits (tpu_walk.py): all its sequence's tiles of queries, or of keys, one after another,
each with the tiles of the other side that the schedule names. What is fetched next is known from scalar memory, so that
transfers run ahead; tiles that are not visited are neither fetched nor stepped over. Each sum has one program, hence
the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from recollect.pallas_kernels.scheduled_attention import tpu_call, tpu_tile
from recollect.pallas_kernels.scheduled_attention.block_schedule import Fields, Visits
from recollect.pallas_kernels.scheduled_attention.flash_vjp import AttentionSettings
from recollect.pallas_kernels.scheduled_attention.tpu_call import LANES, SCALAR_BYTES, BlockedArray, TpuPlan
from recollect.pallas_kernels.scheduled_attention.tpu_grid import (
    MOST_RESIDENT,
    by_groups,
    most_steps,
    resident_tile,
    visit_list,
    visited_tile,
)
from recollect.pallas_kernels.scheduled_attention.tpu_tile import OnlineSoftmax, TileContext

SUBLANES = 16  # of bf16, two to a register's 32 bits
LARGEST_HEAD = 256
LARGEST_BLOCK = 511
ROWS_TOGETHER = 512
"""Slots that landmark blocks taken together have at most."""


def refuses(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block: int | None = None,
    window: int | None = None,
    gathered: bool = False,
    **rest: Any,
) -> str | None:
    """Why the kernels cannot serve a call; None if they can.

    Args:
      q, k, v: as `core.attend` takes them; k and v of landmark blocks may also be the keys before they are laid out.
      block, window: as for `tile_sizes`. gathered: whether tiles of queries have key heads of their own.
    """
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v must all be bfloat16 or all float32; got {q.dtype}, {k.dtype}, {v.dtype}"
    (_, n, _, key_dim), (s, groups) = q.shape, k.shape[1:3]
    if max(key_dim, v.shape[3]) > LARGEST_HEAD:
        return f"heads have at most {LARGEST_HEAD} dimensions; got {key_dim} and {v.shape[3]}"
    if block is not None and block > LARGEST_BLOCK:
        return f"landmark blocks have at most {LARGEST_BLOCK} keys; got {block}"
    # Without a window the smallest tiles there are, as callers may choose others than they would get here.
    query_tile, key_tile = tile_sizes(n, s, key_dim, v.shape[3], q.dtype, window=window or 1, block=block)
    query_tiles, key_tiles = -(-n // query_tile), -(-s // key_tile)
    if block is not None:
        # Of keys before they are laid out there are `block` a tile, and one more that holds what is left.
        key_tiles = 1 + -(-s // block)
        key_tiles = -(-key_tiles // together(key_tiles, key_tile))
    own = max(query_tiles, key_tiles * (groups if gathered else 1))
    if own > MOST_RESIDENT:
        return f"{own} tiles are more than the {MOST_RESIDENT} that a kernel's step can name"
    most = 4 * (query_tiles * key_tiles + own)
    if most > SCALAR_BYTES:
        return f"visits of {query_tiles} x {key_tiles} tiles can take {most} bytes of scalar memory; {SCALAR_BYTES} are left for them"
    return None


def tile_sizes(
    n: int, s: int, k: int, v: int, dtype: jax.typing.DTypeLike, *, window: int | None = None, block: int | None = None
) -> tuple[int, int]:
    """Queries and keys a tile, by reasoning (no TPU has timed them).

    libtpu's schedule for v5e has about 1,750 instructions for a forward step of 512 x 512 pairs of 128 dimensions in
    bf16, where the products alone take 1,024, and 750 for 256 x 256; a step's own cost is some hundreds more. So tiles
    are large, but for narrow windows, of which large tiles of keys would hold mostly what is masked. In fp32 products
    take six passes, and small tiles are enough. The tiles of one side are about equal, so that little is padded. Where
    queries outnumber keys they are taken for gathered ones, of which each head is padded to whole tiles.

    Args:
      n, s, k, v: queries, keys, and dimensions of keys and of values.
      window: keys that a query sees, if few.
      block: see core.AttentionSettings; the tile of keys then holds one block and its landmark, rounded up to whole registers of
        bf16. Kernels take several such tiles together.
    """
    queries, keys = (256, 256) if jnp.dtype(dtype) == jnp.float32 else (512, 512)
    if window is not None and window <= 256:
        keys = 256
    elif (
        queries == 512
        and max(k, v) <= 128
        and min(n, s) >= 4096
        and (window is None or window >= 4096)
        and block is None
    ):
        queries = 1024  # not of keys too, which would double the program's code and its time to compile
    query_tile = _even_tile(n, 256 if n > s else queries)
    return query_tile, _even_tile(s, keys) if block is None else -(-(block + 1) // SUBLANES) * SUBLANES


def _even_tile(length: int, most: int) -> int:
    """Whole lanes, or whole registers of bf16 where one tile of less than 128 holds all."""
    share = -(-length // -(-max(1, length) // most))
    unit = SUBLANES if share <= LANES else LANES
    return max(SUBLANES, -(-share // unit) * unit)


def _in_batches(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls it for a few sequences at a time where the visits of all do not fit into scalar memory."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        *arrays, visits, key_heads, query_fields, key_fields, settings = arguments
        b, sequences = arrays[0].shape[0], visits.count.shape[0]
        fitting = SCALAR_BYTES // (4 * (most_steps(visits) + (0 if key_heads is None else key_heads.shape[1])))
        if sequences == 1 or b <= fitting:
            return function(*arguments)
        part = max([size for size in range(1, b) if b % size == 0 and size <= fitting], default=1)
        leaves, tree = jax.tree.flatten((*arrays, visits, key_heads, dict(query_fields), dict(key_fields)))
        of_sequences = [
            x.ndim > 1 and x.shape[0] == b for x in leaves
        ]  # sinks and what is the same for all sequences stay whole
        moving = [
            jnp.asarray(x).reshape(b // part, part, *x.shape[1:])
            for x, moves in zip(leaves, of_sequences, strict=True)
            if moves
        ]

        def one(parts: list[jax.Array]) -> Any:
            rest = iter(parts)
            return function(
                *jax.tree.unflatten(
                    tree, [next(rest) if moves else x for x, moves in zip(leaves, of_sequences, strict=True)]
                ),
                settings,
            )

        return jax.tree.map(lambda x: x.reshape(b, *x.shape[2:]), jax.lax.map(one, moving))

    return called


@_in_batches
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
    """See core.Kernels."""
    call = _TpuCall(q, k, v, visits, key_heads, query_fields, key_fields, settings, over_queries=False)
    b, n, h, _ = q.shape
    tile, value_dim = settings.query_tile, v.shape[3]
    inputs = [*call.inputs(), *([] if sinks is None else [tpu_call.scalars(sinks)])]
    outputs = [
        tpu_call.new_rows((b, n, h, value_dim), q.dtype, tile, call.plan.queries),
        tpu_call.new_a_query(b, h, n, tile, call.plan.queries),
    ]
    kernel = functools.partial(_forward_kernel, plan=call.plan, context=call.context, with_sinks=sinks is not None)
    scratch = [(1, tile), (1, tile), (value_dim, tile)]
    o, lse = call.run(kernel, inputs, outputs, scratch, products=(1, 1), name="scheduled_attention_forward")
    return tpu_call.as_rows(o, (b, n, h, value_dim)), lse.reshape(b, h, n)


@_in_batches
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
    """See core.Kernels."""
    call = _TpuCall(q, k, v, visits, key_heads, query_fields, key_fields, settings, over_queries=False)
    outputs = [tpu_call.new_rows(q.shape, q.dtype, settings.query_tile, call.plan.queries)]
    kernel = functools.partial(_query_kernel, plan=call.plan, context=call.context)
    scratch = [(q.shape[3], settings.query_tile)]
    inputs = call.inputs() + call.cotangents(do, lse, delta)
    (dq,) = call.run(kernel, inputs, outputs, scratch, products=(2, 1), name="scheduled_attention_query_gradient")
    return tpu_call.as_rows(dq, q.shape)


@_in_batches
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
    """See core.Kernels."""
    call = _TpuCall(q, k, v, visits, key_heads, query_fields, key_fields, settings, over_queries=True)
    made = call.arrays[1:]  # as padded
    outputs = [tpu_call.new_rows(x.shape, x.dtype, call.context.key_rows, call.plan.keys) for x in made]
    kernel = functools.partial(_key_kernel, plan=call.plan, context=call.context)
    scratch = [(call.context.key_rows, x.shape[3]) for x in made]
    inputs = call.inputs() + call.cotangents(do, lse, delta)
    dk, dv = call.run(kernel, inputs, outputs, scratch, products=(2, 2), name="scheduled_attention_key_gradients")
    dk, dv = (tpu_call.as_rows(x, y.shape)[:, : k.shape[1]] for x, y in zip((dk, dv), made, strict=True))
    return dk, dv


class _TpuCall:
    """What the three walks have in common: the arrays that all read, and how they are cut. Small landmark blocks are
    taken several a tile."""

    def __init__(self, q, k, v, visits, key_heads, query_fields, key_fields, settings, *, over_queries: bool):
        b, n, h, _ = q.shape
        blocks = 1
        if settings.block is not None:
            tiles = k.shape[1] // settings.key_tile
            key_fields = {name: x[:, :: settings.key_tile] for name, x in key_fields.items()}
            if key_heads is None:
                blocks = together(tiles, settings.key_tile)
            if blocks > 1:
                visits = by_groups(visits, n // settings.query_tile if over_queries else tiles, blocks, over_queries)
                k, v = (_to_multiple(x, blocks * settings.key_tile) for x in (k, v))
                key_fields = {name: _to_multiple(x, blocks) for name, x in key_fields.items()}
        query_tiles, key_tiles = n // settings.query_tile, k.shape[1] // (blocks * settings.key_tile)
        steps = visit_list(visits, query_tiles if over_queries else key_tiles)
        self.arrays, self.settings, self.key_heads = (q, k, v), settings, key_heads
        self.query_fields, self.key_fields = query_fields, key_fields
        self.plan = TpuPlan(b, h, k.shape[2], query_tiles, key_tiles, steps, key_heads is not None, over_queries)
        cut = settings.block is not None and tiles % blocks
        self.context = TileContext(
            settings, steps, q.dtype, tuple(query_fields) if steps.masked else (), blocks, tiles if cut else None
        )

    def inputs(self) -> list[BlockedArray]:
        """q, k, v and, where masks are looked at, the fields of queries and of keys."""
        q, k, v = self.arrays
        plan, tiles = self.plan, (self.settings.query_tile, self.context.key_rows)
        placed = [tpu_call.rows(q, tiles[0], plan.queries), *(tpu_call.rows(x, tiles[1], plan.keys) for x in (k, v))]
        if self.context.names:
            # All slots of a landmark block have the same fields: one number is enough.
            key_tile = tiles[1] if self.settings.block is None else self.context.blocks
            placed.append(tpu_call.fields(self.query_fields, self.context.names, tiles[0], plan.queries))
            placed.append(tpu_call.fields(self.key_fields, self.context.names, key_tile, plan.keys))
        return placed

    def cotangents(self, do, lse, delta) -> list[BlockedArray]:
        tile, where = self.settings.query_tile, self.plan.queries
        return [
            tpu_call.rows(do, tile, where),
            tpu_call.a_query(lse, tile, where),
            tpu_call.a_query(delta, tile, where),
        ]

    def run(self, kernel, inputs, outputs, scratch, *, products: tuple[int, int], name: str) -> list[jax.Array]:
        """products: how many of a tile have the keys' width, and how many the values'."""
        q, _, v = self.arrays
        pairs = self.settings.query_tile * self.context.key_rows
        flops = 2 * pairs * (products[0] * q.shape[3] + products[1] * v.shape[3])
        return tpu_call.run(
            kernel,
            self.plan,
            self.key_heads,
            inputs,
            outputs,
            scratch,
            flops_a_step=flops,
            exponentials_a_step=pairs,
            name=name,
        )


def together(tiles: int, key_tile: int) -> int:
    """How many of so many landmark blocks a tile of keys takes: evenly, up to ROWS_TOGETHER slots."""
    groups = -(-tiles // max(1, ROWS_TOGETHER // key_tile))
    return -(-tiles // groups)


def _to_multiple(x: Any, size: int) -> Any:
    """With zeros after the last of the second axis."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % size)
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths) if widths[1][1] else x


def _opened(references: Any, plan: TpuPlan, context: TileContext) -> tuple[Any, Any, list[Any]]:
    """The step of this program, a function that gives the mask, and the references but for fields and prefetched
    arrays: q, k, v first."""
    refs = list(references)
    memory = [refs.pop(0) for _ in range(1 + plan.gathered)]
    step = plan.step([pl.program_id(i) for i in range(3)], memory)
    tiles = refs[:3]
    query_fields, key_fields = (refs[3], refs[4]) if context.names else (None, None)
    number = resident_tile(step) if plan.over_queries else visited_tile(step)

    def mask(masked: bool) -> jax.Array | None:
        return context.allowed(query_fields, key_fields, number) if masked else None

    return step, mask, tiles + refs[3 + 2 * bool(context.names) :]


def _forward_kernel(*references: Any, plan: TpuPlan, context: TileContext, with_sinks: bool) -> None:
    step, mask, (q, k, v, *refs) = _opened(references, plan, context)
    sink = refs.pop(0)[pl.program_id(1)] if with_sinks else None
    o, lse, *scratch = refs
    state = OnlineSoftmax(*scratch)

    @pl.when(tpu_tile.starts(step))
    def _():
        state.start(sink)

    @functools.partial(context.visit, step)
    def _(masked):
        tpu_tile.update(context, state, q[0], k[0], v[0], mask(masked))

    @pl.when(tpu_tile.ends(step))
    def _():
        output, sums = state.result()
        o[0] = output.astype(o.dtype)
        lse[0, 0, 0] = sums


def _query_kernel(*references: Any, plan: TpuPlan, context: TileContext) -> None:
    step, mask, (q, k, v, do, lse, delta, dq, collected) = _opened(references, plan, context)

    @pl.when(tpu_tile.starts(step))
    def _():
        collected[...] = jnp.zeros(collected.shape, jnp.float32)

    @functools.partial(context.visit, step)
    def _(masked):
        keys = k[0]
        _, d_scores = tpu_tile.weights_and_score_gradients(
            context, q[0], keys, v[0], do[0], lse[0, 0, 0], delta[0, 0, 0], mask(masked)
        )
        collected[...] += context.dot(keys, d_scores, (0, 0))

    @pl.when(tpu_tile.ends(step))
    def _():
        dq[0] = (context.settings.scale * collected[...]).T.astype(dq.dtype)


def _key_kernel(*references: Any, plan: TpuPlan, context: TileContext) -> None:
    step, mask, (q, k, v, do, lse, delta, dk, dv, for_keys, for_values) = _opened(references, plan, context)
    head, heads = pl.program_id(3), pl.num_programs(3)

    @pl.when(tpu_tile.starts(step) & (head == 0))
    def _():
        for collected in (for_keys, for_values):
            collected[...] = jnp.zeros(collected.shape, jnp.float32)

    @functools.partial(context.visit, step)
    def _(masked):
        queries, cotangents = q[0], do[0]
        weights, d_scores = tpu_tile.weights_and_score_gradients(
            context, queries, k[0], v[0], cotangents, lse[0, 0, 0], delta[0, 0, 0], mask(masked)
        )
        for_keys[...] += context.dot(d_scores, queries, (1, 0))
        for_values[...] += context.dot(weights, cotangents, (1, 0))

    @pl.when(tpu_tile.ends(step) & (head == heads - 1))
    def _():
        dk[0] = (context.settings.scale * for_keys[...]).astype(dk.dtype)
        dv[0] = for_values[...].astype(dv.dtype)
