"""Decays by channel in products of 64 tokens, without overflow.

A pair's weight exp(G_i - G_j), G the running sum of the log decay, is split into a factor a row and a factor a column, exp(G_i - r) and
exp(r - G_j). No reference r serves a whole chunk: with a decay of -10 a token either factor could reach exp(640). So pairs are taken in
three levels, each a product of its own, masked to its pairs:

    0  both in one block of 16: r is G at the block's eighth token; exponents stay within 80, short of fp32's 88
    1  in the two blocks of one half: r is G at their border, and both exponents are at most 0
    2  in different halves: r is G at the middle of the chunk

In reverse the exponents change sign, and pairs run from earlier rows to later columns. The references are marks: every eighth token's G.
The caller clamps log decays at -10 a token, 4.5e-5, below what bf16 resolves beside 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.mosaic_gpu import plgpu

LARGEST_EXPONENT = 80.0
SLICE = 64  # columns worked on at once
LEVELS = 3
LAST = 7  # the mark of a chunk's last token; mark m is token 8 m + 7


@dataclasses.dataclass(frozen=True)
class Factor:
    """Which exponential. level: of the pairs, or None for the pair of a token and a border of its chunk. later: whether the token is the
    later of its pair, whose exponent is G - r; the earlier one's is r - G."""

    level: int | None
    later: bool


def to_border(reverse: bool, reads: bool) -> Factor:
    """The weight with which a token reads the entering state, or is written to the leaving one."""
    return Factor(None, reads != reverse)


def factor(total: Any, marks: Any, which: Factor) -> jax.Array:
    """(c, columns) fp32; 0 for tokens that are in no pair of the level on this side.

    Args:
      total: (c, columns) fp32 in tiled shared memory, at most SLICE columns.
      marks: (c / 8, columns) fp32 in plain shared memory.
    """
    shape = (total.shape[0], total.shape[1])
    summed = gpu.load(total)

    def mark(index: int) -> jax.Array:
        return gpu.along_rows(gpu.load_per_column(marks.at[index]), shape[0])

    if which.level is None:
        return jnp.exp(summed if which.later else mark(LAST) - summed)
    block = gpu.block_of_row(shape)
    if which.level == 0:
        low = jnp.where(block == 0, mark(0), mark(2))
        high = jnp.where(block == 2, mark(4), mark(6))
        reference = jnp.where(block < 2, low, high)
    elif which.level == 1:
        reference = jnp.where(block < 2, mark(1), mark(5))
    else:
        reference = mark(3)
    exponent = summed - reference if which.later else reference - summed
    if which.level == 0:
        return jnp.exp(jnp.minimum(exponent, LARGEST_EXPONENT))
    second = (block & which.level) != 0  # in the second block of its half; in the second half
    return jnp.exp(jnp.where(second if which.later else ~second, exponent, -jnp.inf))


def scale_to(target: Any, x: Any, total: Any, marks: Any, which: Factor, per_token: Any = None) -> None:
    """target = x * factor (* a scalar a token), bf16; target and x (c, k) in tiled shared memory, per_token (c,) in plain."""
    width = min(SLICE, x.shape[1])
    for start in range(0, x.shape[1], width):
        columns = pl.ds(start, width)
        factors = factor(total.at[:, columns], marks.at[:, columns], which)
        if per_token is not None:
            factors = factors * gpu.along_columns(gpu.load_per_row(per_token), width)
        scaled = factors * gpu.load(x.at[:, columns]).astype(jnp.float32)
        target.at[:, columns][...] = scaled.astype(jnp.bfloat16)


def keep(marks: Any, shape: tuple[int, int], by_row: bool) -> jax.Array:
    """The decay of the state (k, columns) over a chunk, by its rows or by its columns."""
    if by_row:
        return gpu.along_columns(jnp.exp(gpu.load_per_row(marks.at[LAST])), shape[1])
    return gpu.along_rows(jnp.exp(gpu.load_per_column(marks.at[LAST])), shape[0])


def scores_by_key(scores: Any, q: Any, k: Any, scaled_q: Any, scaled_k: Any, total: Any, marks: Any, reverse: bool) -> None:
    """scores (c, c) = sum over channels of q_i k_j times the pair's weight, where i and j are a pair in this direction; else anything.

    All bf16, in shared memory; scaled_q, scaled_k: work space.
    """
    for level in reversed(range(LEVELS)):
        scale_to(scaled_q, q, total, marks, Factor(level, not reverse))
        scale_to(scaled_k, k, total, marks, Factor(level, reverse))
        plgpu.commit_smem()
        product = gpu.mm(scaled_q, gpu.transposed(scaled_k)).astype(jnp.bfloat16)
        # The farther levels wait in shared memory: registers are short while operands are scaled.
        scores[...] = product if level == LEVELS - 1 else jnp.where(_nearer_than(level + 1), product, gpu.load(scores))


def lay_by_level(places: Sequence[Any], scores: jax.Array) -> None:
    """scores (c, c), masked to the pairs of this direction, to shared memory as each level takes them, the nearest first."""
    rounded = scores.astype(jnp.bfloat16)
    for level, place in enumerate(places):
        # Farther pairs are left out; nearer ones need not be, the level's factors are 0 there.
        farther = level == LEVELS - 1
        place[...] = rounded if farther else jnp.where(_nearer_than(level + 1), rounded, jnp.bfloat16(0))


def read_by_value(old: jax.Array, scores: Sequence[Any], scaled_v: Any, v: Any, total: Any, marks: Any, reverse: bool) -> jax.Array:
    """old (c, columns) + scores, as laid by level, times v with the pairs' weights on v's columns. scaled_v: work space."""
    for level, place in enumerate(scores):
        scale_to(scaled_v, v, total, marks, Factor(level, reverse))
        plgpu.commit_smem()
        old = old + gpu.mm(place, scaled_v) * factor(total, marks, Factor(level, not reverse))
    return old


def _nearer_than(level: int) -> jax.Array:
    """(c, c) bool: whether a pair belongs to a level before this one, of which 1 and 2 may be asked."""
    shape = (gpu.ROWS, gpu.ROWS)
    return gpu.block_of_row(shape) >> (level - 1) == gpu.block_of_column(shape) >> (level - 1)
