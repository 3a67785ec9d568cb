"""The list of queries that are computed: for each head the tokens that chose it, by position, in tiles that belong to
one head each.

A choice is a pair (token, head). A head's group of rows is filled up to whole tiles at its front, so that its last tile
ends with its last
token and all tiles but the first are full: then the last tokens of tiles lie as far apart as they can, which bounds
what tiles see of the past (`ends`). With at most A choices a token, no choice is ever dropped: `tile_count` tiles
suffice for every routing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class HeadTiles:
    """Which query stands where.

    Attributes:
      tokens: (b, n, tile) int32, the token of each row; t for filler. Within a tile filler comes first, then tokens in
        order.
      heads: (b, n) int32, the head of each tile; any head for tiles of filler alone.
      rows: (b, t, h) int32, the row of each pair in the flattened list; n * tile for pairs that are not chosen.
    """

    tokens: jax.Array
    heads: jax.Array
    rows: jax.Array

    @property
    def sources(self) -> jax.Array:
        """(b, n * tile) index of each row's pair among the t * h pairs; t * h for filler."""
        (b, n, tile), (_, t, h) = self.tokens.shape, self.rows.shape
        pairs = jnp.where(self.tokens < t, self.tokens * h + self.heads[:, :, None], t * h)
        return pairs.reshape(b, n * tile)

    def gather(self, x: jax.Array) -> jax.Array:
        """Rows (b, n * tile, d) of queries (b, t, h, d), zeros for filler."""
        return _taken(x.reshape(x.shape[0], -1, x.shape[3]), self.sources, self._flat_rows())

    def combine(self, x: jax.Array) -> jax.Array:
        """From rows (b, n * tile, d) to (b, t, h, d), zeros for pairs that are not chosen. A gather, as its gradient
        is: no two rows meet."""
        return _taken(x, self._flat_rows(), self.sources).reshape(*self.rows.shape, x.shape[-1])

    def field(self, values: jax.Array, filler: int = 0) -> jax.Array:
        """A field of tokens (b, t) int, by row: (b, n, tile)."""
        t = values.shape[1]
        index = jnp.minimum(self.tokens, t - 1).reshape(values.shape[0], -1)
        return jnp.where(self.tokens < t, jnp.take_along_axis(values, index, axis=1).reshape(self.tokens.shape), filler)

    def latest_first(self) -> HeadTiles:
        """The same tiles, ordered by their last token, the latest first: the i-th then sees at most the first
        `ends(...)[i]` tokens."""
        (b, n, tile), t = self.tokens.shape, self.rows.shape[1]
        last = jnp.max(jnp.where(self.tokens < t, self.tokens, -1), axis=2)
        order = jnp.argsort(-last, axis=1, stable=True)
        place = jnp.argsort(order, axis=1)
        of_tile = jnp.minimum(self.rows // tile, n - 1).reshape(b, -1)
        moved = jnp.take_along_axis(place, of_tile, axis=1).reshape(self.rows.shape) * tile + self.rows % tile
        return HeadTiles(
            jnp.take_along_axis(self.tokens, order[:, :, None], axis=1),
            jnp.take_along_axis(self.heads, order, axis=1),
            jnp.where(self.rows < n * tile, moved, n * tile).astype(jnp.int32),
        )

    def _flat_rows(self) -> jax.Array:
        return self.rows.reshape(self.rows.shape[0], -1)


jax.tree_util.register_dataclass(HeadTiles, data_fields=["tokens", "heads", "rows"], meta_fields=[])


def tile_count(tokens: int, heads: int, active: int, tile: int) -> int:
    """Tiles that suffice, however tokens choose at most `active` heads each: a head's rows leave less than a tile
    empty."""
    return max(1, min((tokens * active + heads * (tile - 1)) // tile, heads * -(-tokens // tile)))


@functools.lru_cache(maxsize=256)
def ends(tokens: int, heads: int, active: int, tile: int) -> tuple[int, ...]:
    """For each tile of `latest_first`, a bound on the tokens before and including its last one, whatever the routing.

    Of the last y tokens at most active * y rows come, of at most that many heads. A tile that reaches into them is full
    of such rows but for one a head, so there are at most `reaching(y)` such tiles, and the tile of rank reaching(y)
    ends before those y tokens.
    """

    def reaching(y: int) -> int:
        rows = active * y
        return min((rows + min(heads, rows) * (tile - 1)) // tile, heads * -(-y // tile))

    found, y = [], 0
    for rank in range(tile_count(tokens, heads, active, tile)):
        while y < tokens and reaching(y + 1) <= rank:
            y += 1
        found.append(tokens - y)
    return tuple(found)


def group_by_head(chosen: jax.Array, active: int, tile: int) -> HeadTiles:
    """The head_tiles of a routing.

    Args:
      chosen: (b, t, h) bool, at most `active` true a token (a choice beyond the static bound that this gives would be
        lost).
      tile: rows a tile.
    """
    t, h = chosen.shape[1:]
    n = tile_count(t, h, active, tile)
    counted = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
    count = counted[:, -1]
    tiles = (count + tile - 1) // tile
    after = jnp.cumsum(tiles, axis=1, dtype=jnp.int32)
    first = after * tile - count  # of each head's rows, after the filler
    rows = jnp.where(chosen, first[:, None] + counted - 1, n * tile)
    heads = jnp.sum(jnp.arange(n)[:, None] >= after[:, None, :], axis=2, dtype=jnp.int32)
    used, heads = heads < h, jnp.minimum(heads, h - 1)
    within = (
        jnp.arange(n * tile, dtype=jnp.int32).reshape(1, n, tile)
        - jnp.take_along_axis(first, heads, axis=1)[:, :, None]
    )
    tokens = _places(jnp.take_along_axis(jnp.swapaxes(counted, 1, 2), heads[:, :, None], axis=1), within + 1)
    tokens = jnp.where(used[:, :, None] & (within >= 0), tokens, t)
    return HeadTiles(tokens.astype(jnp.int32), heads, rows.astype(jnp.int32))


def _places(counted: jax.Array, wanted: jax.Array) -> jax.Array:
    """Where a count that never falls, (b, n, t), first reaches each of `wanted` (b, n, tile): a binary search, no
    scatter."""
    t = counted.shape[2]
    low = jnp.zeros(wanted.shape, jnp.int32)
    for step in _halves(t):
        probe = low + step
        below = jnp.take_along_axis(counted, jnp.minimum(probe, t) - 1, axis=2) < wanted
        low = jnp.where((probe <= t) & below, probe, low)
    return low


def _halves(t: int) -> list[int]:
    return list(itertools.takewhile(bool, (1 << i for i in reversed(range(t.bit_length())))))


@jax.custom_vjp
def _taken(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x (b, m, d) at index (b, n), zeros where it is m. `inverse` (b, m) says for each of the m where it went, n for
    nowhere."""
    m = x.shape[1]
    batch = jnp.arange(x.shape[0])[:, None]
    found = x.at[batch, jnp.minimum(index, m - 1)].get(mode="promise_in_bounds")
    return jnp.where((index < m)[..., None], found, 0)


def _taken_forward(x, index, inverse):
    return _taken(x, index, inverse), (index, inverse)


def _taken_backward(kept, cotangent):
    index, inverse = kept
    return _taken(cotangent, inverse, index), None, None


_taken.defvjp(_taken_forward, _taken_backward)
