"""The mask algebra: which query may see which key, as an expression over token fields.

    mask = Causal() & Window(64) & SameSegment()
    softmax_attention(q, k, v, mask=mask, query_segments=segments)
    cells = (KeyIs("token_types", (PERCEPT,)) & Causal("ring")) | OfHeads((0, 1))
    softmax_attention(q, k, v, mask=cells, query_fields={"token_types": types, "ring": ring})

Leaves compare one field of the query with one of the key by intervals (a difference in a range, an equality, a key
below a bound); what is allowed never depends on storage order. So an expression also bounds, from the least and
greatest values of fields in two tiles of tokens, whether none or all of their pairs are allowed: block schedules
(scheduled_attention/block_schedule.py) use that, and kernels skip empty tiles. Padding (segment 0) is never seen by
anyone: `dense` and kernels add that to every expression. `OfHeads` differs by head: the operation computes heads of
different masks apart, so that kernels never meet it.

Easy to get wrong: what all pairs of an `Or` satisfy may be known of neither side, and what some pair of an `And`
satisfies may need different pairs: both then count as unknown, which costs time and never gives a wrong mask.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import numpy as np

from recollect.pallas_kernels.mask_expressions import (
    HEADS,
    LANDMARK,
    ORDINARY,
    PERCEPT,
    PREFIX,
    And,
    Everything,
    Mask,
    Not,
    OfHeads,
    Or,
    TokenFields,
)


class _OfField(Mask):
    """A leaf that reads one field, named by its attribute `field`."""

    field: str

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({self.field})

    def _pair(self, query: Any, key: Any) -> tuple[Any, Any]:
        """Returns the field of queries and of keys."""
        return getattr(query, self.field), getattr(key, self.field)


@dataclasses.dataclass(frozen=True)
class Causal(_OfField):
    """Keys at or before the query's position, or whose `field` is at most the query's."""

    field: str = "positions"

    def allows(self, query: Any, key: Any) -> Any:
        q, k = self._pair(query, key)
        return k <= q

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        q, k = self._pair(query, key)
        return k.low <= q.high, k.high <= q.low


@dataclasses.dataclass(frozen=True)
class Earlier(_OfField):
    """Keys whose field is less than the query's."""

    field: str = "positions"

    def allows(self, query: Any, key: Any) -> Any:
        q, k = self._pair(query, key)
        return k < q

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        q, k = self._pair(query, key)
        return k.low < q.high, k.high < q.low


@dataclasses.dataclass(frozen=True)
class EarlierBlock(Earlier):
    """Keys of landmark blocks before the query's."""

    field: str = "blocks"


@dataclasses.dataclass(frozen=True)
class Window(_OfField):
    """Keys less than `window` positions before the query (and any after it): with `Causal`, `window` keys, itself
    included."""

    window: int
    field: str = "positions"

    def allows(self, query: Any, key: Any) -> Any:
        q, k = self._pair(query, key)
        return q - k < self.window

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        q, k = self._pair(query, key)
        return q.low - k.high < self.window, q.high - k.low < self.window


@dataclasses.dataclass(frozen=True)
class WindowAfter(_OfField):
    """Keys less than `window` positions after the query (and any before it)."""

    window: int
    field: str = "positions"

    def allows(self, query: Any, key: Any) -> Any:
        q, k = self._pair(query, key)
        return k - q < self.window

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        q, k = self._pair(query, key)
        return k.low - q.high < self.window, k.high - q.low < self.window


def band(window: int, field: str = "positions") -> Mask:
    """Returns the mask of keys less than `window` positions from the query, on either side."""
    return Window(window, field) & WindowAfter(window, field)


@dataclasses.dataclass(frozen=True)
class Sinks(_OfField):
    """The first `count` tokens of a document, or keys whose `field` is less than `count`."""

    count: int
    field: str = "positions"

    def allows(self, query: Any, key: Any) -> Any:
        return getattr(key, self.field) < self.count

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        field = getattr(key, self.field)
        return field.low < self.count, field.high < self.count


@dataclasses.dataclass(frozen=True)
class Same(_OfField):
    """Keys whose field equals the query's."""

    field: str

    def allows(self, query: Any, key: Any) -> Any:
        q, k = self._pair(query, key)
        return q == k

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        x, y = self._pair(query, key)
        return (y.low <= x.high) & (x.low <= y.high), (y.low == x.high) & (x.low == y.high)


@dataclasses.dataclass(frozen=True)
class SameSegment(Same):
    """Keys of the query's document."""

    field: str = "segments"


@dataclasses.dataclass(frozen=True)
class SameBlock(Same):
    """Keys of the query's landmark block."""

    field: str = "blocks"


@dataclasses.dataclass(frozen=True)
class _OneOf(_OfField):
    """Pairs of which one side's field is one of `values`. A set of tokens is a field that is 1 in it."""

    field: str
    values: tuple[int, ...]

    def _side(self, query: Any, key: Any) -> Any:
        raise NotImplementedError

    def allows(self, query: Any, key: Any) -> Any:
        field = self._side(query, key)
        return functools.reduce(operator.or_, (field == value for value in self.values))

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        field = self._side(query, key)
        some = ((field.low <= value) & (field.high >= value) for value in self.values)
        every = ((field.low == value) & (field.high == value) for value in self.values)
        return functools.reduce(operator.or_, some), functools.reduce(operator.or_, every)


@dataclasses.dataclass(frozen=True)
class QueryIs(_OneOf):
    """Every key, for queries whose field is one of `values`; none for the others."""

    def _side(self, query: Any, key: Any) -> Any:
        return getattr(query, self.field)


@dataclasses.dataclass(frozen=True)
class KeyIs(_OneOf):
    """Keys whose field is one of `values`."""

    def _side(self, query: Any, key: Any) -> Any:
        return getattr(key, self.field)


@dataclasses.dataclass(frozen=True)
class IsOrdinary(KeyIs):
    """Keys that are ordinary tokens."""

    field: str = "token_types"
    values: tuple[int, ...] = (ORDINARY,)


@dataclasses.dataclass(frozen=True)
class IsLandmark(KeyIs):
    """Keys that are landmarks."""

    field: str = "token_types"
    values: tuple[int, ...] = (LANDMARK,)


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


__all__ = [
    "HEADS",
    "LANDMARK",
    "ORDINARY",
    "PERCEPT",
    "PREFIX",
    "And",
    "Causal",
    "Earlier",
    "EarlierBlock",
    "Everything",
    "IsLandmark",
    "IsOrdinary",
    "KeyIs",
    "Mask",
    "Not",
    "OfHeads",
    "Or",
    "QueryIs",
    "Same",
    "SameBlock",
    "SameSegment",
    "Sinks",
    "StoredNear",
    "TokenFields",
    "Window",
    "WindowAfter",
    "band",
    "causal",
]
