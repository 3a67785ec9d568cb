"""Whole documents packed into rows of one length, each a segment of its own.

Each document is cut into pieces of at most `length` tokens, one after the other from its start, and pieces that do not
fill a row share rows: a row takes the longest piece left, then again and again the longest that still fits ("best fit,
longest first"; Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, pack so too). Pieces are
numbered 1, 2, ... within their row as segments, 0 is padding, and attention does not cross from one to the next.

What a row takes depends only on how many pieces of each size are left. So a row's pattern of sizes repeats until one of
these sizes runs short, and is laid out at once for all its repetitions: the loop is over patterns (a few times
`length`), not over pieces, and 30 million documents take seconds. A plan takes 8 bytes of memory per document and about
6 per piece.

Easy to get wrong: pieces of one document are separate segments, wherever they lie. Which pieces share a row doesn't
matter to a model that keeps segments apart, so the rows stay the same from epoch to epoch and only their order changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import numpy as np
from jaxtyping import Int

from recollect.data.text.rows.base import RowPlan, Sequences, Span, smallest_dtype


@chz.chz(typecheck=True)
class Packed(Sequences):
    """Whole documents in rows, kept apart by segment ids; positions restart with each document."""

    def plan(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int) -> PackedPlan:
        return PackedPlan(lengths, length)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Row r holds the pieces `order[begin[r]:begin[r + 1]]`."""

    order: Int[np.ndarray, " pieces"]
    begin: Int[np.ndarray, " rows_and_one"]

    def __len__(self) -> int:
        return len(self.begin) - 1

    def pieces(self, row: int) -> Int[np.ndarray, " n"]:
        """Returns the numbers of the pieces of one row."""
        return self.order[int(self.begin[row]) : int(self.begin[row + 1])]


def pack(sizes: Int[np.ndarray, " pieces"], length: int) -> PackedRows:
    """Returns rows of at most `length` tokens that hold each of the pieces of `sizes` tokens once; deterministic.

    Raises:
      ValueError: a piece is empty or longer than a row, or `length` is not positive.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1")
    sizes = np.asarray(sizes, np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > length):
        raise ValueError(f"sizes: each must be between 1 and length={length}, found {sizes.min()} .. {sizes.max()}")
    by_size = smallest_dtype(np.argsort(sizes, kind="stable"))
    counts = np.bincount(sizes, minlength=length + 1)
    at = (np.cumsum(counts) - counts).tolist()
    left = counts.tolist()
    # Bit s is set while a piece of size s is left: the longest that fits is then the highest bit below a bound.
    present = sum(1 << int(size) for size in np.flatnonzero(counts))
    orders, widths = [np.zeros(0, by_size.dtype)], [np.zeros(1, np.int64)]
    while present:
        places = _pattern(present, left, length)
        times = min(left[size] // len(columns) for size, columns in places.items())
        width = sum(map(len, places.values()))
        pieces = np.empty((times, width), by_size.dtype)
        for size, columns in places.items():
            taken = times * len(columns)
            pieces[:, columns] = by_size[at[size] : at[size] + taken].reshape(times, -1)
            at[size] += taken
            left[size] -= taken
            if not left[size]:
                present &= ~(1 << size)
        orders.append(pieces.reshape(-1))
        widths.append(np.full(times, width))
    return PackedRows(np.concatenate(orders), smallest_dtype(np.cumsum(np.concatenate(widths))))


def _pattern(present: int, left: list[int], length: int) -> dict[int, list[int]]:
    """Returns what the next row takes: size -> its places in the row."""
    places: dict[int, list[int]] = {}
    room, place = length, 0
    while fitting := present & ((1 << (room + 1)) - 1):
        size = fitting.bit_length() - 1
        columns = places.setdefault(size, [])
        columns.append(place)
        room -= size
        place += 1
        if len(columns) == left[size]:
            present &= ~(1 << size)
    return places


class PackedPlan(RowPlan):
    """Rows of packed pieces.

    Args:
      lengths: tokens of each document.
      length: tokens per row.
    """

    segmented = True

    def __init__(self, lengths: Int[np.ndarray, " documents"], length: int):
        lengths = np.asarray(lengths, np.int64)
        counts = -(-lengths // length)
        self._document_lengths = lengths
        self._first = np.concatenate([[0], np.cumsum(counts)])
        sizes = np.full(int(self._first[-1]), length, np.int64)
        filled = counts > 0
        sizes[self._first[1:][filled] - 1] = (lengths - (counts - 1) * length)[filled]
        self._rows = pack(sizes, length)
        self.lengths = (length,)
        self.counts = (len(self._rows),)
        self.fill = float(lengths.sum()) / max(len(self._rows) * length, 1)

    def spans(self, group: int, row: int) -> list[Span]:
        """See `RowPlan`."""
        length = self.lengths[0]
        pieces = self._rows.pieces(row).astype(np.int64)
        documents = np.searchsorted(self._first, pieces, side="right") - 1
        starts = (pieces - self._first[documents]) * length
        stops = np.minimum(starts + length, self._document_lengths[documents])
        return list(zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True))

    def facts(self) -> dict[str, Any]:
        """Returns the number of rows, and the share of their positions that hold a token."""
        return {**super().facts(), "fill": self.fill}
