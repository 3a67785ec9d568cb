"""Expressions of the mask algebra (masks.py, which has its leaves): combined, rewritten, resolved per head."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

ORDINARY, LANDMARK, PERCEPT, PREFIX = 0, 1, 2, 3
"""Types of tokens: text; landmarks; what a continuous input or a grid's cell stands at; what is seen as a whole before
the text is continued."""

HEADS = "heads"
"""Named among the fields of a mask that differs by head."""


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

    def rewritten(self, of_leaf: Callable[[Mask], Mask]) -> Mask:
        """Returns the expression with each leaf replaced by what `of_leaf` returns of it, without sides that then allow
        everything or nothing."""
        return of_leaf(self)

    def of_head(self, head: int) -> Mask:
        """Returns the mask of one query head, free of `OfHeads`."""
        return self.rewritten(lambda leaf: leaf.at(head) if isinstance(leaf, OfHeads) else leaf)

    @property
    def differs_by_head(self) -> bool:
        """Whether it has an `OfHeads`."""
        return HEADS in self.fields

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
    neutral: ClassVar[Mask]  # a side that leaves the other as it is

    @property
    def fields(self) -> frozenset[str]:
        return self.left.fields | self.right.fields

    def rewritten(self, of_leaf: Callable[[Mask], Mask]) -> Mask:
        left, right = self.left.rewritten(of_leaf), self.right.rewritten(of_leaf)
        if left == self.neutral or right == self.neutral:
            return right if left == self.neutral else left
        decides = Not(self.neutral).rewritten(lambda leaf: leaf)
        return decides if decides in (left, right) else type(self)(left, right)

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

    def rewritten(self, of_leaf: Callable[[Mask], Mask]) -> Mask:
        inner = self.inner.rewritten(of_leaf)
        return inner.inner if isinstance(inner, Not) else Not(inner)


@dataclasses.dataclass(frozen=True)
class Everything(Mask):
    """Every key: full, non-causal attention."""

    def allows(self, query: Any, key: Any) -> Any:
        return np.True_

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        return np.True_, np.True_


And.neutral, Or.neutral = Everything(), Not(Everything())


@dataclasses.dataclass(frozen=True)
class OfHeads(Mask):
    """Every key, for these query heads; none for the others. Taken out by `of_head` before a mask is evaluated."""

    heads: tuple[int, ...]
    reads = (HEADS,)

    def at(self, head: int) -> Mask:
        """Returns the mask of one head."""
        return Everything() if head in self.heads else Not(Everything())
