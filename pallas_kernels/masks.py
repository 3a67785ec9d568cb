"""The mask algebra: which query may see which key, as an expression over token fields.

    mask = Causal() & Window(64) & SameSegment()
    allowed = mask.dense(query_fields, key_fields)          # (b, t, s) bool
    softmax_attention(q, k, v, mask=mask, query_fields=query_fields.present(), key_fields=key_fields.present())

Leaves compare one field of the query with one of the key by intervals (a difference in a range, an equality, a key
below a bound); what is allowed never depends on storage order. So an expression also bounds, from the least and
greatest values of fields in two tiles of tokens, whether none or all of their pairs are allowed: block schedules
(scheduled_attention/block_schedule.py) use that, and kernels skip empty tiles. Padding (segment 0) is never seen by
anyone: `dense` and kernels add that to every expression.

Easy to get wrong: what all pairs of an `Or` satisfy may be known of neither side, and what some pair of an `And`
satisfies may need different pairs: both then count as unknown, which costs time and never gives a wrong mask.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import jax
import numpy as np

ORDINARY, LANDMARK, PERCEPT, PREFIX = 0, 1, 2, 3
"""Types of tokens: text; landmarks; what a continuous input or a grid's cell stands at; what is seen as a whole before
the text is continued."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenFields:
    """The fields of tokens that masks may read: positions, segments, token_types, blocks; each (b, time) int32.

    `blocks` numbers the landmark blocks within a document: position // (block + 1).
    """

    positions: jax.Array
    segments: jax.Array
    token_types: jax.Array | None = None
    blocks: jax.Array | None = None

    def present(self) -> dict[str, jax.Array]:
        """Returns the fields that are not None, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}


class Mask:
    """An expression over token fields; combine with `&`, `|` and `~`.

    Masks are hashable, and constants of a traced program. `reads` names the fields that a leaf reads.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields it reads."""
        return frozenset(self.reads)

    def allows(self, query: Any, key: Any) -> Any:
        """Returns bool, from int32 fields query.NAME and key.NAME that broadcast against each other.

        Padding is not considered. It is called inside kernels too: comparisons, + and -, and &, | and ~ of comparisons
        only.
        """
        raise NotImplementedError

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        """Returns whether some pair may be, and whether every pair is, allowed in a tile of queries and one of keys,
        whose fields query.NAME and key.NAME have the attributes low and high."""
        raise NotImplementedError

    def dense(self, query: TokenFields, key: TokenFields) -> jax.Array:
        """Returns the (b, t, s) bool mask of all pairs, False where either is padding."""
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


def _and(left: Any, right: Any) -> Any:
    """Returns left & right, without an operation where one is the constant True (kernels compute what is written)."""
    if left is np.True_:
        return right
    return left if right is np.True_ else left & right


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Pairs that both sides allow."""

    combine = staticmethod(_and)


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Pairs that either side allows."""

    combine = staticmethod(operator.or_)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Pairs that `inner` does not allow (padding stays unseen)."""

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

    def allows(self, query: Any, key: Any) -> Any:
        return np.True_

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.True_


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query's position."""

    reads = ("positions",)

    def allows(self, query: Any, key: Any) -> Any:
        return key.positions <= query.positions

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.positions.low <= query.positions.high, key.positions.high <= query.positions.low


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Keys less than `window` positions before the query (and any after it): with `Causal`, `window` keys, itself
    included."""

    window: int
    reads = ("positions",)

    def allows(self, query: Any, key: Any) -> Any:
        return query.positions - key.positions < self.window

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        least, greatest = query.positions.low - key.positions.high, query.positions.high - key.positions.low
        return least < self.window, greatest < self.window


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """The first `count` tokens of a document."""

    count: int
    reads = ("positions",)

    def allows(self, query: Any, key: Any) -> Any:
        return key.positions < self.count

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.positions.low < self.count, key.positions.high < self.count


class _SameField(Mask):
    """Keys whose field, the one of `reads`, equals the query's."""

    def allows(self, query: Any, key: Any) -> Any:
        return getattr(query, self.reads[0]) == getattr(key, self.reads[0])

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        x, y = getattr(query, self.reads[0]), getattr(key, self.reads[0])
        return (y.low <= x.high) & (x.low <= y.high), (y.low == x.high) & (x.low == y.high)


@dataclasses.dataclass(frozen=True)
class SameSegment(_SameField):
    """Keys of the query's document."""

    reads = ("segments",)


@dataclasses.dataclass(frozen=True)
class SameBlock(_SameField):
    """Keys of the query's landmark block."""

    reads = ("blocks",)


@dataclasses.dataclass(frozen=True)
class EarlierBlock(Mask):
    """Keys of landmark blocks before the query's."""

    reads = ("blocks",)

    def allows(self, query: Any, key: Any) -> Any:
        return key.blocks < query.blocks

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return key.blocks.low < query.blocks.high, key.blocks.high < query.blocks.low


class _OfType(Mask):
    """Keys whose token type is `token_type`."""

    token_type: ClassVar[int]
    reads = ("token_types",)

    def allows(self, query: Any, key: Any) -> Any:
        return key.token_types == self.token_type

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        low, high, kind = key.token_types.low, key.token_types.high, self.token_type
        return (low <= kind) & (high >= kind), (low == kind) & (high == kind)


@dataclasses.dataclass(frozen=True)
class IsOrdinary(_OfType):
    """Keys that are ordinary tokens."""

    token_type = ORDINARY


@dataclasses.dataclass(frozen=True)
class IsLandmark(_OfType):
    """Keys that are landmarks."""

    token_type = LANDMARK


@dataclasses.dataclass(frozen=True)
class StoredNear(Mask):
    """Every key, with what the caller knows of storage (field order, a token's place in storage): the rest of the
    expression hides keys stored after the query and, if `reach` is set, keys stored `reach` or more places before it.

    It hides nothing itself. Tiles that it calls empty are known when a program is traced, whatever positions are.
    """

    reach: int | None = None
    reads = ("order",)

    def allows(self, query: Any, key: Any) -> Any:
        return np.True_

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        some = key.order.low <= query.order.high
        if self.reach is not None:
            some = some & (query.order.low - key.order.high < self.reach)
        return some, np.True_


def causal(window: int | None = None, *, segmented: bool = False, ordered: bool = False) -> Mask:
    """Returns the mask of causal softmax attention: keys at or before the query, in its window and of its document.

    Args:
      window: keys that a query sees, itself included; None is all before it.
      segmented: whether documents are separated by the field segments.
      ordered: whether keys stored after a query are known to be hidden from it (`StoredNear`; needs the field order).
    """
    mask: Mask = Causal()
    if window is not None:
        mask = mask & Window(window)
    if segmented:
        mask = mask & SameSegment()
    return mask & StoredNear() if ordered else mask
