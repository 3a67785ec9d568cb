"""The mask algebra: which query may see which key, as an expression over token fields.

    mask = Causal() & Window(64) & SameSegment()
    allowed = mask.dense(query_fields, key_fields)          # (b, t, s) bool
    softmax_attention(q, k, v, mask=mask, query_fields=query_fields.present(), key_fields=key_fields.present())

Leaves compare one field of the query with one of the key by intervals (a difference in a range, an equality, a key
below a bound); nothing refers to storage order. So an expression also tells, from the least and greatest values of
fields in two tiles of tokens, whether
none or all of their pairs are allowed: that is a rule of recollect.pallas_kernels.scheduled_attention.block_schedule,
and kernels skip what it calls empty. Padding (segment 0) is never seen by anyone: `dense` and kernels add that to every
expression.

Easy to get wrong: what all pairs of an `Or` satisfy may be known of neither side, and what some pair of an `And`
satisfies may need different
pairs: both then count as unknown, which costs time and never a wrong mask.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import jax
import numpy as np

ORDINARY, LANDMARK = 0, 1
"""Types of tokens."""


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

    def present(self) -> dict[str, jax.Array]:
        """The fields that are there, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}


class Mask:
    """An expression; combine with `&`, `|` and `~`. Every mask is a
    `recollect.pallas_kernels.scheduled_attention.block_schedule.Rule`."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields it reads."""
        raise NotImplementedError

    def allows(self, query: Any, key: Any) -> Any:
        """bool, from fields of query and key (attributes) that broadcast against each other; padding not considered."""
        raise NotImplementedError

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        """(may some pair be allowed, are all pairs allowed) from fields whose attributes low and high bound the
        tokens of a tile."""
        raise NotImplementedError

    def dense(self, query: TokenFields, key: TokenFields) -> jax.Array:
        """(b, t, s) bool: the expression, and neither side is padding."""
        for fields in (query.present(), key.present()):
            missing = sorted(self.fields - fields.keys())
            assert not missing, f"the mask reads the field {missing[0]}, which is not given"
        rows = TokenFields(**{name: x[:, :, None] for name, x in query.present().items()})
        columns = TokenFields(**{name: x[:, None, :] for name, x in key.present().items()})
        return (rows.segments != 0) & (columns.segments != 0) & self.allows(rows, columns)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    """Two expressions, combined by an operator on bools."""

    left: Mask
    right: Mask

    combine: ClassVar[Any]

    @property
    def fields(self) -> frozenset[str]:
        return self.left.fields | self.right.fields

    def allows(self, query: Any, key: Any) -> Any:
        return self.combine(self.left.allows(query, key), self.right.allows(query, key))

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        (left_some, left_all), (right_some, right_all) = self.left.bounds(query, key), self.right.bounds(query, key)
        return self.combine(left_some, right_some), self.combine(left_all, right_all)


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Both."""

    combine = staticmethod(operator.and_)


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Either."""

    combine = staticmethod(operator.or_)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """What `inner` does not allow (padding stays unseen)."""

    inner: Mask

    @property
    def fields(self) -> frozenset[str]:
        return self.inner.fields

    def allows(self, query: Any, key: Any) -> Any:
        return ~self.inner.allows(query, key)

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        some, every = self.inner.bounds(query, key)
        return ~every, ~some


@dataclasses.dataclass(frozen=True)
class Everything(Mask):
    """Every key: full, non-causal attention."""

    @property
    def fields(self) -> frozenset[str]:
        return frozenset()

    def allows(self, query: Any, key: Any) -> Any:
        return np.True_

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.True_


class _OfPositions(Mask):
    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"positions"})


@dataclasses.dataclass(frozen=True)
class Causal(_OfPositions):
    """Keys at or before the query's position."""

    def allows(self, query: Any, key: Any) -> Any:
        return key.positions <= query.positions

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.positions.low <= query.positions.high, key.positions.high <= query.positions.low


@dataclasses.dataclass(frozen=True)
class Window(_OfPositions):
    """Keys less than `window` positions before the query (and any after it): with `Causal`, `window` keys, itself
    included."""

    window: int

    def allows(self, query: Any, key: Any) -> Any:
        return query.positions - key.positions < self.window

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        least, greatest = query.positions.low - key.positions.high, query.positions.high - key.positions.low
        return least < self.window, greatest < self.window


@dataclasses.dataclass(frozen=True)
class Sinks(_OfPositions):
    """The first `count` tokens of a document."""

    count: int

    def allows(self, query: Any, key: Any) -> Any:
        return key.positions < self.count

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.positions.low < self.count, key.positions.high < self.count


@dataclasses.dataclass(frozen=True)
class _SameField(Mask):
    """Keys whose field equals the query's."""

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({self.field})

    @property
    def field(self) -> str:
        raise NotImplementedError

    def allows(self, query: Any, key: Any) -> Any:
        return getattr(query, self.field) == getattr(key, self.field)

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        own, theirs = getattr(query, self.field), getattr(key, self.field)
        meet = (own.low <= theirs.high) & (theirs.low <= own.high)
        return meet, (own.low == theirs.high) & (theirs.low == own.high)


@dataclasses.dataclass(frozen=True)
class SameSegment(_SameField):
    """Keys of the query's document."""

    field = "segments"


@dataclasses.dataclass(frozen=True)
class SameBlock(_SameField):
    """Keys of the query's landmark block."""

    field = "blocks"


@dataclasses.dataclass(frozen=True)
class EarlierBlock(Mask):
    """Keys of landmark blocks before the query's."""

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"blocks"})

    def allows(self, query: Any, key: Any) -> Any:
        return key.blocks < query.blocks

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.blocks.low < query.blocks.high, key.blocks.high < query.blocks.low


@dataclasses.dataclass(frozen=True)
class IsLandmark(Mask):
    """Keys that are landmarks."""

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"token_types"})

    def allows(self, query: Any, key: Any) -> Any:
        return key.token_types == LANDMARK

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        types = key.token_types
        return (types.low <= LANDMARK) & (types.high >= LANDMARK), (types.low == LANDMARK) & (types.high == LANDMARK)
