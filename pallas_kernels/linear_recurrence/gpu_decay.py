"""Decays by channel in products of 64 tokens, without overflow and with one exponential a side.

A pair's weight exp(G_i - G_j), G the running sum of the log decay, is split into a factor a row and a factor a column,
exp(G_i - r) and exp(r - G_j). No reference r serves a whole chunk: with a decay of -10 a token either factor could
reach exp(640). So pairs are taken in three levels, each a product of its own, out of which its pairs are picked:

    0  both in one block of 16: r is G at the block's eighth token; exponents stay within 80, short of fp32's 88
    1  in neighbouring blocks: r is G at their border, and both exponents are at most 0
    2  farther apart: r is G at the middle of the chunk, and both exponents are at most 0

and a token is read from, or written to, a border of its chunk. From level to level and on to the border a token's
reference moves away from it, so its factor shrinks by exp(difference of two marks), a mark being every eighth token's
G. That difference is the same for a channel of a block; in base 2 and with references rounded to integers it is a power
of 2, by which bf16 is multiplied without rounding. So exponentials are taken for level 0 alone, and the operands of the
farther levels are made of its operands in place. Nothing that matters underflows on
the way: factors shrink monotonically, to less than 2^-126 only where the exact one is. What rounding the border at the
chunk's last token leaves, a power of 2 between -1 and 0, is multiplied to the state in fp32 (`rest`).

The smallest factor, e^-80, leaves fp32 with all its bits for numbers from 6e-4 on alone: where 8 tokens in a row decay
by e^-10 each.

In reverse the exponents change sign, and pairs run from earlier rows to later columns.
The caller clamps log decays at -10 a token, 4.5e-5, below what bf16 resolves beside 1.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.mosaic_gpu import plgpu

LOG2_E = 1.4426950408889634
SLICE = 64  # columns worked on at once
LEVELS = 3
BORDER = 3  # after the levels
MARKED = 8  # tokens a mark
MARKS = gpu.ROWS // MARKED  # a chunk; mark m is token 8 m + 7, and mark -1 the chunk's start
LAST = MARKS - 1


def reference_shape(columns: int) -> tuple[int, int]:
    """Of the references of so many channels, fp32 in plain shared memory: row m + 1 is mark m's in base 2, an
    integer."""
    return (MARKS + 1, columns)


def store_start(references: Any) -> None:
    """Fills the row of references that is the same in every chunk, its start's."""
    start = references.at[0]
    start[...] = gpu.per_column(jnp.zeros(start.shape, jnp.float32))


def store_references(references: Any, ratios: Any, marks: Any) -> None:
    """Fills references, and ratios (MARKS, columns) bf16: 2^(a mark's reference - that of the mark before).

    Args:
      marks: (MARKS, columns) fp32. All in plain shared memory, references with its start (`store_start`).
    """
    layout = plgpu.Layout.WG_STRIDED(marks.shape, vec_size=1)  # an entry in one thread alone
    own = references.at[pl.ds(1, MARKS)]
    own[...] = (gpu.load(marks, layout) * LOG2_E).astype(jnp.int32).astype(jnp.float32)
    before = references.at[pl.ds(0, MARKS)]
    ratios[...] = jnp.exp2(gpu.load(own, layout) - gpu.load(before, layout)).astype(jnp.bfloat16)


def keep(marks: Any, references: Any, shape: tuple[int, int], by_row: bool, rounded: bool) -> jax.Array:
    """The decay of the state (k, columns) over a chunk, by its rows or by its columns; rounded: but for what `rest`
    holds."""
    return _over(
        jnp.exp2(_load(references.at[LAST + 1], by_row)) if rounded else jnp.exp(_load(marks.at[LAST], by_row)),
        shape,
        by_row,
    )


def rest(marks: Any, references: Any, shape: tuple[int, int], by_row: bool) -> jax.Array:
    """What rounding has left out of weights to the border at the chunk's last token, for a state as in `keep`."""
    return _over(
        jnp.exp2(_load(marks.at[LAST], by_row) * LOG2_E - _load(references.at[LAST + 1], by_row)), shape, by_row
    )


def scale_to_border(
    x: Any, total: Any, marks: Any, references: Any, later: bool, rounded: bool, per_token: Any = None, part: Any = None
) -> None:
    """x = x * the weight between a token and the chunk's start (later) or end (* a scalar per token), bf16.

    Args:
      x: (c, k) bf16 in tiled shared memory.
      total: (c, k) fp32 in tiled, marks: (MARKS, k) fp32 in plain, per_token: (c,) in plain shared memory.
      rounded: whether the end is the rounded one, which leaves `rest` to be multiplied to what becomes of x.
      part: which columns, if not all.
    """
    for columns in _slices(x, part):
        exponents = gpu.load(total.at[:, columns]) * LOG2_E
        if not later:
            end = references.at[LAST + 1, columns] if rounded else marks.at[LAST, columns]
            exponents = gpu.along_rows(gpu.load_per_column(end) * (1.0 if rounded else LOG2_E), gpu.ROWS) - exponents
        factors = jnp.exp2(exponents)
        if per_token is not None:
            factors = factors * gpu.along_columns(gpu.load_per_row(per_token), factors.shape[1])
        x.at[:, columns][...] = _times(factors, x.at[:, columns])


def scores_by_key(
    scores: Any,
    q: Any,
    k: Any,
    scaled_q: Any,
    scaled_k: Any,
    total: Any,
    references: Any,
    ratios: Any,
    reverse: bool,
    meanwhile: Callable[[], None] = lambda: None,
    part: Any = None,
    meet: Callable[[], None] = lambda: None,
) -> None:
    """scores (c, c) = sum over channels of q_i k_j times the pair's weight, where i and j are a pair in this direction;
    else anything.

    All but total, references and ratios bf16. scaled_q, scaled_k: q and k themselves or work space; left with the
    operands of the last level (`step`). meanwhile: called during the first product, when total has been read. part: the
    columns which this warpgroup makes operands of; meet: waits for the one that makes the others.
    """
    for columns in _slices(q, part):
        later = _exponents(total.at[:, columns], references.at[:, columns])
        for scaled, x, exponents in (
            (scaled_q, q, -later if reverse else later),
            (scaled_k, k, later if reverse else -later),
        ):
            scaled.at[:, columns][...] = _times(jnp.exp2(exponents), x.at[:, columns])
    for level in range(LEVELS):
        if level:
            meet()
            step(scaled_q, ratios, level, not reverse, part=part)
            step(scaled_k, ratios, level, reverse, part=part)
        plgpu.commit_smem()
        meet()
        left, right = scaled_q, gpu.transposed(scaled_k)
        product = (gpu.mm(left, right) if level else gpu.mm(left, right, meanwhile=meanwhile)).astype(jnp.bfloat16)
        # The nearer levels wait in shared memory: registers are short while operands are scaled.
        scores[...] = product if level == 0 else jnp.where(_nearer_than(level), gpu.load(scores), product)


def step(scaled: Any, ratios: Any, level: int, later: bool, per_token: Any = None, part: Any = None) -> None:
    """Takes operands (c, columns) from the level before to this one, or BORDER, in place (* a scalar per token, 0 or
    1).

    later: whether the tokens are the later of their pairs. part: which columns, if not all.
    """
    for columns in _slices(scaled, part):
        x = gpu.load(scaled.at[:, columns]) * _ratio(ratios.at[:, columns], level, later)
        if per_token is not None:
            x = x * gpu.along_columns(gpu.load_per_row(per_token).astype(jnp.bfloat16), x.shape[1])
        scaled.at[:, columns][...] = x


def store_by_level(places: Sequence[Any], scores: jax.Array) -> None:
    """scores (c, c), masked to the pairs of this direction, to shared memory as each level takes them, the nearest
    first."""
    rounded, zero = scores.astype(jnp.bfloat16), jnp.bfloat16(0)
    for level, place in enumerate(places):
        own = rounded if level == LEVELS - 1 else jnp.where(_nearer_than(level + 1), rounded, zero)
        place[...] = own if level == 0 else jnp.where(_nearer_than(level), zero, own)


def read_by_value(
    from_state: Callable[[jax.Array], jax.Array],
    scores: Sequence[Any],
    scaled_v: Any,
    v: Any,
    total: Any,
    marks: Any,
    references: Any,
    ratios: Any,
    reverse: bool,
    meanwhile: Callable[[], None],
) -> jax.Array:
    """(c, columns): scores, as laid by level, times v with the pairs' weights on v's columns, and from_state(the
    weights to the border).

    scaled_v: work space, left with v as of the last level (`step`). meanwhile: called when v and total have been read.
    """
    later = _exponents(total, references)
    scaled_v[...] = _times(jnp.exp2(later if reverse else -later), v)
    factors = jnp.exp2(-later if reverse else later)
    plgpu.commit_smem()
    out = gpu.mm(scores[0], scaled_v, meanwhile=meanwhile) * factors
    for level in range(1, LEVELS):
        step(scaled_v, ratios, level, reverse)
        factors = factors * _ratio(ratios, level, not reverse).astype(jnp.float32)
        plgpu.commit_smem()
        out = out + gpu.mm(scores[level], scaled_v) * factors
    factors = factors * _ratio(ratios, BORDER, not reverse).astype(jnp.float32)
    if reverse:
        factors = factors * rest(marks, references, (gpu.ROWS, total.shape[1]), by_row=False)
    return out + from_state(factors)


def _times(factors: jax.Array, x: Any) -> jax.Array:
    return (factors * gpu.load(x).astype(jnp.float32)).astype(jnp.bfloat16)


def _slices(x: Any, part: Any = None) -> list[Any]:
    if part is not None:
        return [part]
    width = min(SLICE, x.shape[1])
    return [pl.ds(start, width) for start in range(0, x.shape[1], width)]


def _load(vector: Any, by_row: bool) -> jax.Array:
    return gpu.load_per_row(vector) if by_row else gpu.load_per_column(vector)


def _over(vector: jax.Array, shape: tuple[int, int], by_row: bool) -> jax.Array:
    return gpu.along_columns(vector, shape[1]) if by_row else gpu.along_rows(vector, shape[0])


def _marks(level: int, later: bool) -> list[int]:
    """The marks which the tokens of the four blocks are referred to in a level."""
    if level == 0:
        return [0, 2, 4, 6]
    own = [-1, 1, 3, 5] if later else [1, 3, 5, LAST]
    if level == 1:
        return own
    middle = [min(mark, 3) if later else max(mark, 3) for mark in own]
    return middle if level < BORDER else [-1 if later else LAST] * 4


def _exponents(total: Any, references: Any) -> jax.Array:
    """(c, columns): level 0's exponents, in base 2, of tokens that are the later of their pairs; the earlier ones'
    are minus these."""
    own = [gpu.load_per_column(references.at[mark + 1]) for mark in _marks(0, True)]
    return gpu.load(total) * LOG2_E - _by_block(own, total.shape)


def _ratio(ratios: Any, level: int, later: bool) -> jax.Array:
    """(c, columns) bf16: a level's factor over that of the level before."""

    @functools.cache
    def between(first: int, last: int) -> Any:
        rows = [gpu.load_per_column(ratios.at[mark]) for mark in range(first + 1, last + 1)]
        return functools.reduce(operator.mul, rows) if rows else None

    pairs = zip(_marks(level - 1, later), _marks(level, later), strict=True)
    return _by_block([between(*sorted(pair)) for pair in pairs], (gpu.ROWS, ratios.shape[1]))


def _by_block(numbers: Sequence[jax.Array | None], shape: tuple[int, int]) -> jax.Array:
    """Each block's own number a column; None is 1."""
    block = gpu.block_of_row(shape)
    spread = {id(one): jnp.bfloat16(1) if one is None else gpu.along_rows(one, shape[0]) for one in numbers}
    result = spread[id(numbers[-1])]
    for index in reversed(range(len(numbers) - 1)):
        if numbers[index] is not numbers[index + 1]:
            result = jnp.where(block <= index, spread[id(numbers[index])], result)
    return result


def _nearer_than(level: int) -> jax.Array:
    """(c, c) bool: whether a pair belongs to a level before this one, of which 1 and 2 may be asked."""
    shape = (gpu.ROWS, gpu.ROWS)
    apart = gpu.block_of_row(shape) - gpu.block_of_column(shape)
    return apart == 0 if level == 1 else apart * apart <= 1
