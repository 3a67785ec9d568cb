"""The mask algebra: which query may see which key, as an expression over token fields.

    mask = Causal() & Window(64) & SameSegment()
    allowed = mask.dense(query_fields, key_fields)          # (b, t, s) bool

Leaves compare one field of the query with one of the key by intervals (a difference in a range, an equality, a key below a bound),
so that a kernel's block schedule can later be derived from the fields' minima and maxima a block; nothing refers to storage
order. Padding (segment 0) is never seen by anyone: `dense` adds that to every expression.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from layers.mixer import LANDMARK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenFields:
    """What masks may read of tokens: positions, segments, token_types, blocks; each (b, time) int32.

    `blocks` numbers the landmark blocks within a document: position // (block + 1).
    """

    positions: jax.Array
    segments: jax.Array
    token_types: jax.Array | None = None
    blocks: jax.Array | None = None


class Mask:
    """An expression; combine with `&`, `|` and `~`."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        """(b, t, s) bool, padding not considered."""
        raise NotImplementedError

    def dense(self, query: TokenFields, key: TokenFields) -> jax.Array:
        """(b, t, s) bool: the expression, and neither side is padding."""
        real = (query.segments != 0)[:, :, None] & (key.segments != 0)[:, None, :]
        return self.allows(query, key) & real

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Both."""

    left: Mask
    right: Mask

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return self.left.allows(query, key) & self.right.allows(query, key)


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Either."""

    left: Mask
    right: Mask

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return self.left.allows(query, key) | self.right.allows(query, key)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """What `inner` does not allow (padding stays unseen)."""

    inner: Mask

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return ~self.inner.allows(query, key)


@dataclasses.dataclass(frozen=True)
class Everything(Mask):
    """Every key: full, non-causal attention."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        shape = (*query.positions.shape, key.positions.shape[1])
        return jnp.ones(shape, bool)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query's position."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return key.positions[:, None, :] <= query.positions[:, :, None]


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Keys less than `window` positions before the query (and any after it): with `Causal`, `window` keys, itself included."""

    window: int

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return query.positions[:, :, None] - key.positions[:, None, :] < self.window


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """The first `count` tokens of a document."""

    count: int

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        seen = key.positions[:, None, :] < self.count
        return jnp.broadcast_to(seen, (*query.positions.shape, key.positions.shape[1]))


@dataclasses.dataclass(frozen=True)
class SameSegment(Mask):
    """Keys of the query's document."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        return query.segments[:, :, None] == key.segments[:, None, :]


@dataclasses.dataclass(frozen=True)
class SameBlock(Mask):
    """Keys of the query's landmark block."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        assert query.blocks is not None and key.blocks is not None, "SameBlock reads the field blocks"
        return query.blocks[:, :, None] == key.blocks[:, None, :]


@dataclasses.dataclass(frozen=True)
class EarlierBlock(Mask):
    """Keys of landmark blocks before the query's."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        assert query.blocks is not None and key.blocks is not None, "EarlierBlock reads the field blocks"
        return key.blocks[:, None, :] < query.blocks[:, :, None]


@dataclasses.dataclass(frozen=True)
class IsLandmark(Mask):
    """Keys that are landmarks."""

    def allows(self, query: TokenFields, key: TokenFields) -> jax.Array:
        assert key.token_types is not None, "IsLandmark reads the field token_types"
        found = (key.token_types == LANDMARK)[:, None, :]
        return jnp.broadcast_to(found, (*query.positions.shape, key.positions.shape[1]))
