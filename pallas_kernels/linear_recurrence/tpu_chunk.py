"""One chunk of a few heads of a walk (see chunk_scan.py), on values that are in a TPU's vector memory.

Heads of less than 128 channels lie side by side in its 128 lanes, (c, heads d), and stay there: the state is block
diagonal, (heads k, heads v), so that one product reads or writes the states of all; where heads must not mix, `only`
clears the others' lanes. Cutting a head out of its lanes would cost more than these zeros.

Everything is a matrix product of at most c x c. A decay per head multiplies the scores of a chunk. A decay per channel
k acts inside

    q_i . k_j weighted = sum_k q_ik exp(G_ik - G_jk) k_jk

where exp(-G) by itself overflows. So pairs are sorted by how far apart they are: i and j in neighbouring blocks of 16,
32, ... tokens of one block twice as long take the boundary R between the two as reference, and both exp(G_i - R) and
exp(R - G_j) are at most 1; pairs inside a block of 16 take its middle, from which no token is further than 8. One
product a level, masked to its pairs, and nothing else is needed (Yang et al. 2023, "Gated Linear Attention", section
4.3, has two such levels). A decay on the channels of v weighs the other product of the chunk in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from recollect.pallas_kernels.linear_recurrence.chunk_scan import Decay

BASE = (
    16  # tokens of the smallest block: 8 on either side of its middle, each decaying by at most e^-10, stay within fp32
)
LARGEST_EXPONENT = 80.0  # e^80 = 5.5e34: times a value below 6,000 it is finite in fp32, and times a masked 0 it is 0


@dataclasses.dataclass(frozen=True)
class ScanKind:
    """What kind of walk: c tokens a chunk, where the decay acts, its direction, whether j = i is left out, the factor
    of what is read;
    heads: how many lie side by side."""

    size: int
    decay: Decay
    reverse: bool
    strict: bool
    scale: float
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class Documents:
    """same (c, c): pairs of one document; starts, ends (c, 1) and keeps (1, 1) as chunk_scan.Chunks has them."""

    same: jax.Array
    starts: jax.Array
    ends: jax.Array
    keeps: jax.Array


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a chunk of heads that lie side by side.

    pairs: of a decay per head or none, (c, c) per head: weights, or whether a pair counts where there is no decay.
    levels: of a decay per channel.
    reads, writes: (c, 1) or (c, channels), None is 1. keep: what multiplies the state, None is 1.
    """

    pairs: tuple[jax.Array, ...]
    levels: tuple[Level, ...]
    reads: jax.Array | None
    writes: jax.Array | None
    keep: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Level:
    """Pairs (c, c) of one distance; their weight is row_i column_j, (c, channels) each."""

    pairs: jax.Array
    row: jax.Array
    column: jax.Array


def weights(kind: ScanKind, total: Sequence[jax.Array], documents: Documents | None, value_dim: int) -> Weights:
    """total: nothing without decay, (1, c) per head for a decay per head, one (c, channels) for one per channel;
    sums inside the chunk."""
    starts, ends, keeps = (
        (None, None, None) if documents is None else (documents.starts, documents.ends, documents.keeps)
    )
    if kind.decay == "none":
        reads, writes = (ends, starts) if kind.reverse else (starts, ends)
        return Weights((_both(_ordered(kind), documents),) * kind.heads, (), reads, writes, keeps)
    pairs: tuple[jax.Array, ...] = ()
    levels: tuple[Level, ...] = ()
    if kind.decay == "head":
        columns = [as_column(row) for row in total]
        seen = _both(_ordered(kind), documents)
        between = [row - column if kind.reverse else column - row for row, column in zip(total, columns, strict=True)]
        pairs = tuple(jnp.exp(jnp.where(seen, x, -jnp.inf)) for x in between)
        since_start = side_by_side(columns, value_dim)
        last = side_by_side([row[:, kind.size - 1 :] for row in total], value_dim)
    else:
        (since_start,) = total
        last = since_start[kind.size - 1 :]
        levels = tuple(_levels(kind, since_start, documents))
    to_start, to_end = _times(jnp.exp(since_start), starts), _times(jnp.exp(last - since_start), ends)
    reads, writes = (to_end, to_start) if kind.reverse else (to_start, to_end)
    keep = _times(jnp.exp(last), keeps)
    return Weights(pairs, levels, reads, writes, as_column(keep) if kind.decay == "key" else keep)


def products(kind: ScanKind, q: jax.Array, k: jax.Array) -> list[jax.Array]:
    """q k^T of every head, (c, c) fp32."""
    return [by_rows(only(q, head, kind.heads), k) for head in range(kind.heads)]


def read(
    kind: ScanKind,
    weights: Weights,
    q: jax.Array,
    k: jax.Array,
    written: jax.Array,
    state: jax.Array,
    raw: list[jax.Array] | None,
) -> jax.Array:
    """o (c, v) fp32: scale (reads_i . q_i S + sum_j pair_ij (q_i . k_j) written_j). raw: `products` of q and k, not
    for decay "key"."""
    dtype, heads = q.dtype, range(kind.heads)
    if kind.decay == "key":
        out = from_state(_times(q, weights.reads).astype(dtype), state)
        apart = [
            (level.pairs, products(kind, (q * level.row).astype(dtype), (k * level.column).astype(dtype)))
            for level in weights.levels
        ]
        for head in heads:
            scores = _sum(jnp.where(pairs, found[head], 0) for pairs, found in apart)
            out = out + plain(scores.astype(dtype), only(written, head, kind.heads))
    else:
        out = _times(from_state(q, state), weights.reads)
        raw = products(kind, q, k) if raw is None else raw
        for level in weights.levels:
            parts = in_parts(written * level.column, dtype)
            masked = [jnp.where(level.pairs, raw[head], 0).astype(dtype) for head in heads]
            out = out + level.row * _sum(
                plain(masked[head], only(part, head, kind.heads)) for head in heads for part in parts
            )
        for head, pairs in enumerate(weights.pairs):
            weighed = jnp.where(pairs, raw[head], 0) if kind.decay == "none" else raw[head] * pairs
            out = out + plain(weighed.astype(dtype), only(written, head, kind.heads))
    if weights.levels and not kind.strict:
        # Levels leave j = i out: its weight is exactly 1, and in the decay's gradient what it adds to dq and to dk must
        # cancel.
        own = row_sums(q.astype(jnp.float32) * k.astype(jnp.float32), kind.heads)
        out = out + side_by_side(own, written.shape[1] // kind.heads) * written.astype(jnp.float32)
    return out if kind.scale == 1.0 else out * kind.scale


def outer(kind: ScanKind, weights: Weights, k: jax.Array, written: jax.Array) -> jax.Array:
    """sum_j writes_j . k_j written_j^T, (k, v) fp32. What is weighted, or fp32 already, enters with fp32's
    precision."""
    dtype = k.dtype
    if kind.decay == "key":
        keys, values = in_parts(_times(k, weights.writes), dtype), in_parts(written, dtype)
        update = _sum(product(a, b, 0, 0) for i, a in enumerate(keys) for j, b in enumerate(values) if i + j < 2)
    elif weights.writes is None and kind.heads == 1:
        # libtpu 0.0.42 fails for v6e where this product has the same right operand as that of the scores, and a
        # transposed left one.
        update = _sum(product(part, k, 0, 0) for part in in_parts(written, dtype)).T
    else:
        update = _sum(product(k, part, 0, 0) for part in in_parts(_times(written, weights.writes), dtype))
    if kind.heads == 1:
        return update
    own = [
        _lanes(update.shape, 0, head, kind.heads) & _lanes(update.shape, 1, head, kind.heads)
        for head in range(kind.heads)
    ]
    return jnp.where(functools.reduce(operator.or_, own), update, 0)


def from_state(x: jax.Array, state: jax.Array) -> jax.Array:
    """x S: (c, v) fp32 of x (c, k). The state keeps fp32's precision."""
    return _sum(plain(x, part) for part in in_parts(state, x.dtype))


def in_parts(x: jax.Array, dtype) -> tuple[jax.Array, ...]:
    """Values of dtype whose sum is x: one where x has it already, two where x is fp32 and dtype bf16 (to 2^-17)."""
    if x.dtype == dtype:
        return (x,)
    high = x.astype(dtype)
    return high, (x - high.astype(x.dtype)).astype(dtype)


def plain(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b, fp32."""
    return product(a, b, 1, 0)


def by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T, fp32."""
    return product(a, b, 1, 1)


def only(x: jax.Array, head: int, heads: int) -> jax.Array:
    """x (n, heads d) with 0 for the other heads."""
    return x if heads == 1 else jnp.where(_lanes(x.shape, 1, head, heads), x, jnp.zeros_like(x))


def side_by_side(columns: Sequence[jax.Array], width: int) -> jax.Array:
    """(n, 1) of every head in that head's lanes, (n, heads width); of one head as it is."""
    found = columns[0]
    shape = found.shape[0], len(columns) * width
    for head in range(1, len(columns)):
        found = jnp.where(lax.broadcasted_iota(jnp.int32, shape, 1) < head * width, found, columns[head])
    return found


def row_sums(x: jax.Array, heads: int) -> list[jax.Array]:
    """Of every head of x (n, heads d), the sum over its channels, (n, 1)."""
    return [jnp.sum(only(x, head, heads), axis=1, keepdims=True) for head in range(heads)]


def as_column(row: jax.Array) -> jax.Array:
    """(1, n) as (n, 1)."""
    return row.reshape(row.shape[1], 1)


def as_row(column: jax.Array) -> jax.Array:
    """(n, 1) as (1, n)."""
    return column.reshape(1, column.shape[0])


def product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums products of two matrices over axis of_a of a and of_b of b: fp32, of fp32 with all its bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _lanes(shape: tuple[int, ...], axis: int, head: int, heads: int):
    index, width = lax.broadcasted_iota(jnp.int32, shape, axis), shape[axis] // heads
    return (index >= head * width) & (index < (head + 1) * width)


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _levels(kind: ScanKind, total, documents):
    c = kind.size
    base = min(BASE, c)
    row, column = _indices(c)
    block = base.bit_length() - 1
    reference = _spread(total, base, base // 2 - 1)
    up, down = _exp(total - reference), _exp(reference - total)
    inside = lax.shift_right_logical(row, block) == lax.shift_right_logical(column, block)
    ordered = row < column if kind.reverse else row > column
    yield Level(_both(inside & ordered, documents), *((down, up) if kind.reverse else (up, down)))
    half = base
    while half < c:
        reference = _spread(total, 2 * half, half - 1)
        shift = half.bit_length() - 1
        later = lax.shift_right_logical(lax.broadcasted_iota(jnp.int32, total.shape, 0), shift) & 1 == 1
        # Of the later half only its distance from the boundary is asked for, of the earlier half only that to the
        # boundary.
        factor = _exp(jnp.where(later, total - reference, reference - total))
        far, near = (column, row) if kind.reverse else (row, column)
        far, near = lax.shift_right_logical(far, shift), lax.shift_right_logical(near, shift)
        yield Level(_both((far == near + 1) & (near & 1 == 0), documents), factor, factor)
        half *= 2


def _spread(total, block: int, at: int):
    """Row `at` of every block of rows, for all rows of the block."""
    parts = [
        jnp.broadcast_to(total[start + at : start + at + 1], (block, total.shape[1]))
        for start in range(0, total.shape[0], block)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _exp(x):
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


def _indices(c: int):
    return lax.broadcasted_iota(jnp.int32, (c, c), 0), lax.broadcasted_iota(jnp.int32, (c, c), 1)


def _ordered(kind: ScanKind):
    row, column = _indices(kind.size)
    if kind.reverse:
        return row < column if kind.strict else row <= column
    return row > column if kind.strict else row >= column


def _both(pairs, documents: Documents | None):
    return pairs if documents is None else pairs & documents.same


def _times(x, factor):
    return x if factor is None else x * factor
