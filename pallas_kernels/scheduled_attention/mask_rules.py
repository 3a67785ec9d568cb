"""The rules that operations here make of their own arguments; other masks come as rules from outside
(pallas_kernels/masks.py)."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Before:
    """Keys at or before the query, of its document, fewer than `window` positions back: what softmax attention sees.

    Attributes:
      window: None for all that is before.
      segmented: whether documents are told apart by the field segments.
      ordered: whether tokens also have the field order, their place in storage: then keys stored after the query are
        known to be hidden, which tells at trace time that half of the tiles are empty, whatever positions are.
    """

    window: int | None = None
    segmented: bool = False
    ordered: bool = False

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(
            {"positions"} | ({"segments"} if self.segmented else set()) | ({"order"} if self.ordered else set())
        )

    def allows(self, query: Any, key: Any) -> Any:
        allowed = key.positions <= query.positions
        if self.window is not None:
            allowed = allowed & (query.positions - key.positions < self.window)
        if self.segmented:
            allowed = allowed & (query.segments == key.segments)
        return allowed

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        some = key.positions.low <= query.positions.high
        every = key.positions.high <= query.positions.low
        if self.window is not None:
            some = some & (query.positions.low - key.positions.high < self.window)
            every = every & (query.positions.high - key.positions.low < self.window)
        if self.segmented:
            some = some & (key.segments.low <= query.segments.high) & (query.segments.low <= key.segments.high)
            every = every & (key.segments.low == query.segments.high) & (query.segments.low == key.segments.high)
        if self.ordered:
            some = some & (key.order.low <= query.order.high)
        return some, every


@dataclasses.dataclass(frozen=True)
class OwnBlock:
    """Ordinary keys at or before the query, of its document and landmark block.

    Fields: positions, segments (where segmented), blocks (the block's number within the document) and landmarks (1 for
    a landmark).
    """

    segmented: bool = False
    ordered: bool = False

    @property
    def fields(self) -> frozenset[str]:
        return Before(None, self.segmented, self.ordered).fields | {"blocks", "landmarks"}

    def allows(self, query: Any, key: Any) -> Any:
        return Before(None, self.segmented).allows(query, key) & (key.blocks == query.blocks) & (key.landmarks == 0)

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        some, every = Before(None, self.segmented, self.ordered).bounds(query, key)
        some = (
            some
            & (key.blocks.low <= query.blocks.high)
            & (query.blocks.low <= key.blocks.high)
            & (key.landmarks.low <= 0)
        )
        every = (
            every
            & (key.blocks.low == query.blocks.high)
            & (query.blocks.low == key.blocks.high)
            & (key.landmarks.high == 0)
        )
        return some, every


@dataclasses.dataclass(frozen=True)
class EarlierBlocks:
    """Keys of landmark blocks before the query's, of its document. Fields: blocks, and segments where segmented."""

    segmented: bool = False

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"blocks"} | ({"segments"} if self.segmented else set()))

    def allows(self, query: Any, key: Any) -> Any:
        allowed = key.blocks < query.blocks
        return allowed & (query.segments == key.segments) if self.segmented else allowed

    def bounds(self, query: Any, key: Any) -> tuple[Any, Any]:
        some, every = key.blocks.low < query.blocks.high, key.blocks.high < query.blocks.low
        if self.segmented:
            some = some & (key.segments.low <= query.segments.high) & (query.segments.low <= key.segments.high)
            every = every & (key.segments.low == query.segments.high) & (query.segments.low == key.segments.high)
        return some, every
