"""Block schedules: the tiles of keys that each tile of queries has to visit, and which of those need their mask.

A mask (pallas_kernels/masks.py) says which query may see which key, by fields of the two tokens (positions, segments,
...). From the least and the greatest value of each field in a tile, its interval arithmetic finds whether a tile of
pairs is EMPTY (no pair is allowed), FULL (all are) or PARTIAL (it may be either, pair by pair). It errs towards
PARTIAL, never towards the others.

Fields that are numpy arrays are known when a program is traced, and so is what follows from them alone; fields that
are jax arrays make a schedule on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.masks import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2
SEGMENTS = "segments"

Array = Any  # numpy's or jax's
Fields = Mapping[str, Array]
"""Name -> (b or 1, tokens) int32."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The least and the greatest value of a field in a tile."""

    low: Array
    high: Array


class Tokens:
    """Fields by attribute: Tokens(positions=x).positions is x."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


def tile_allows(mask: Mask, query: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
    """Returns the mask of pairs (..., t, s): the expression, and where segments are given that neither is padding
    (segment 0). Fields must broadcast."""
    allowed = mask.allows(Tokens(**query), Tokens(**key))
    if SEGMENTS in query:
        allowed = allowed & (query[SEGMENTS] != 0) & (key[SEGMENTS] != 0)
    return allowed


def pairs_allowed(mask: Mask, query: Fields, key: Fields) -> jax.Array:
    """Returns the mask of all pairs, (b or 1, t, s), from fields (b or 1, t) of queries and (b or 1, s) of keys."""
    rows = {name: jnp.asarray(x)[:, :, None] for name, x in query.items()}
    return tile_allows(mask, rows, {name: jnp.asarray(x)[:, None, :] for name, x in key.items()})


def padded_fields(
    query: Fields, key: Fields, lengths: tuple[int, int], padded: tuple[int, int]
) -> tuple[Fields, Fields]:
    """Returns both sides' fields at the padded lengths (t, s), zeros at the end; with segments if there is padding or
    either side has them."""
    if SEGMENTS in query or SEGMENTS in key or lengths != padded:
        query, key = (
            {SEGMENTS: np.ones((1, n), np.int32), **fields} for n, fields in zip(lengths, (query, key), strict=True)
        )
    sides = []
    for fields, n, size in zip((query, key), lengths, padded, strict=True):
        pads = ((0, 0), (0, size - n))
        sides.append(
            {
                name: (np if isinstance(x, np.ndarray) else jnp).pad(x.astype(np.int32), pads)
                for name, x in fields.items()
            }
        )
    return sides[0], sides[1]


def needed(mask: Mask, fields: Fields) -> dict[str, Array]:
    """Returns those of `fields` that `tile_allows` reads, sorted by name."""
    return {name: fields[name] for name in sorted(fields) if name in mask.fields or name == SEGMENTS}


@dataclasses.dataclass(frozen=True)
class Visits:
    """For each tile of one side the tiles of the other side to visit, in order.

    count (b', g', tiles) int32; index (b', g', tiles, m) int32, of which the first `count` count and the others repeat
    the last of them (0 if there is none), so that a pipeline fetches nothing new for them; partial (b', g', tiles, m)
    int32, 1 where the mask must be evaluated. b' and g' are the number of sequences and of key heads, or 1 where the
    schedule is the same for all.
    """

    count: Array
    index: Array
    partial: Array

    @property
    def longest(self) -> int | jax.Array:
        """The greatest count; an int where the schedule is known at trace time (0 is given as 1, as grids are never
        empty)."""
        if isinstance(self.count, np.ndarray):
            return max(1, int(self.count.max()))
        return jnp.maximum(1, jnp.max(self.count))


jax.tree_util.register_dataclass(Visits, data_fields=["count", "index", "partial"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """kinds: (b', nq, nk) int8 of EMPTY, PARTIAL, FULL; numpy if known at trace time. most: (nq, nk) numpy bool, tiles
    that are not EMPTY for what is known at trace time."""

    kinds: Array
    most: np.ndarray

    def visits(self) -> Visits:
        """Returns for each tile of queries its tiles of keys, (b', 1, nq, m)."""
        return _visits(self.kinds[:, None], int(self.most.sum(axis=1).max(initial=0)))

    def transposed(self, key_heads: jax.Array | None = None, heads: int = 1) -> Visits:
        """Returns for each tile of keys its tiles of queries: (b', 1, nk, m), over which the gradients of keys and
        values are summed.

        key_heads: (b, nq), the one key head of `heads` that a tile of queries attends with; then (b, heads, nk, m).
        """
        kinds = jnp.swapaxes(self.kinds, 1, 2) if isinstance(self.kinds, jax.Array) else np.swapaxes(self.kinds, 1, 2)
        most = int(self.most.sum(axis=0).max(initial=0))
        if key_heads is None:
            return _visits(kinds[:, None], most)
        of_head = key_heads[:, None, None, :] == jnp.arange(heads)[:, None, None]
        return _visits(jnp.where(of_head, jnp.asarray(kinds)[:, None], EMPTY), most)


def block_schedule(
    mask: Mask, query: Fields, key: Fields, lengths: tuple[int, int], tiles: tuple[int, int]
) -> BlockSchedule:
    """Returns the schedule of a mask over tiles.

    Args:
      query, key: the fields that the mask reads and, where tokens may be padding, segments: (b or 1, t) and (b or 1,
        s).
      lengths, tiles: (t, s), and the sizes of tiles of queries and of keys, which divide them.

    Raises:
      ValueError: the mask reads a field that is missing.
    """
    for side, fields in (("query", query), ("key", key)):
        missing = sorted(mask.fields - fields.keys())
        if missing:
            raise ValueError(
                f"the mask reads the field {missing[0]}, which the {side} tokens lack; "
                f"they have {', '.join(sorted(fields)) or 'none'}"
            )
    query, key = needed(mask, query), needed(mask, key)
    counts = (lengths[0] // tiles[0], lengths[1] // tiles[1])
    some, every = _bounds(mask, query, key, tiles, counts)
    kinds = some.astype(np.int8) + (some & every).astype(np.int8)
    if isinstance(kinds, np.ndarray):
        return BlockSchedule(kinds, (kinds != EMPTY).any(axis=0))
    query, key = ({name: _known(x) for name, x in fields.items()} for fields in (query, key))
    return BlockSchedule(kinds, _bounds(mask, query, key, tiles, counts)[0].any(axis=0))


def _known(field: Array) -> Array:
    """Returns a field as far as it is known at trace time: itself, or its shape."""
    return field if isinstance(field, np.ndarray) else jax.ShapeDtypeStruct((1, field.shape[1]), np.int32)


def _bounds(
    mask: Mask, query: Fields, key: Fields, tiles: tuple[int, int], counts: tuple[int, int]
) -> tuple[Array, Array]:
    """Returns whether some pair may be, and every pair is, allowed: (b', nq, nk) each, numpy if all fields are
    known."""
    query_ranges, key_ranges = (
        {name: _range(x, fields.get(SEGMENTS), tile, axis) for name, x in fields.items()}
        for fields, tile, axis in ((query, tiles[0], 2), (key, tiles[1], 1))
    )
    some, every = mask.bounds(Tokens(**query_ranges), Tokens(**key_ranges))
    for ranges, fields, tile, axis in ((query_ranges, query, tiles[0], 2), (key_ranges, key, tiles[1], 1)):
        if SEGMENTS in fields:
            # A tile of nothing but padding has an empty range.
            some, every = (
                some & (ranges[SEGMENTS].low <= ranges[SEGMENTS].high),
                every & _no_padding(fields[SEGMENTS], tile, axis),
            )
    xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
    shape = jnp.broadcast_shapes(np.shape(some), np.shape(every), (1, *counts))
    return xp.broadcast_to(some, shape), xp.broadcast_to(every, shape)


LEAST, GREATEST = (
    np.iinfo(np.int32).min // 2,
    np.iinfo(np.int32).max // 2,
)  # halves, so that differences of two do not overflow


def _range(field: Array, segments: Array | None, tile: int, axis: int) -> Range:
    """Returns the range of tokens that are no padding. axis: where a dimension of 1 is inserted, 2 for queries and 1
    for keys."""
    if isinstance(field, jax.ShapeDtypeStruct):
        shape = (1, field.shape[1] // tile)
        return Range(np.expand_dims(np.full(shape, LEAST), axis), np.expand_dims(np.full(shape, GREATEST), axis))
    low = high = field
    if segments is not None and not isinstance(segments, jax.ShapeDtypeStruct):
        xp = np if isinstance(field, np.ndarray) and isinstance(segments, np.ndarray) else jnp
        low, high = xp.where(segments != 0, field, GREATEST), xp.where(segments != 0, field, LEAST)
    low, high = (x.reshape(x.shape[0], -1, tile) for x in (low, high))
    return Range(_inserted(low.min(axis=2), axis), _inserted(high.max(axis=2), axis))


def _no_padding(segments: Array, tile: int, axis: int) -> Array:
    if isinstance(segments, jax.ShapeDtypeStruct):
        return np.zeros((1, 1, 1), bool)
    return _inserted((segments != 0).reshape(segments.shape[0], -1, tile).all(axis=2), axis)


def _inserted(x: Array, axis: int) -> Array:
    return x[:, :, None] if axis == 2 else x[:, None, :]


def _visits(kinds: Array, most: int) -> Visits:
    """Returns the visits of kinds (b', g', tiles, others). most: the greatest count that can be."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    present = kinds != EMPTY
    count = present.sum(axis=-1).astype(np.int32)
    order = xp.argsort(~present, axis=-1, **({"kind": "stable"} if xp is np else {"stable": True}))[..., : max(1, most)]
    last = xp.take_along_axis(order, xp.maximum(count[..., None] - 1, 0), axis=-1)
    within = xp.arange(order.shape[-1]) < count[..., None]
    index = xp.where(within, order, xp.where(count[..., None] > 0, last, 0)).astype(np.int32)
    partial = (xp.take_along_axis(kinds, index, axis=-1) == PARTIAL).astype(np.int32)
    return Visits(count, index, partial)
