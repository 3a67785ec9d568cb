"""Concatenate and chunk: all documents one after the other in a random order, cut into rows of one length.

Every token but the last of all has a successor, and a row's last target is the next row's first token: nothing is
wasted but the end of the last row. A document that a cut divides continues in another row without what came before. A
plan takes 16 bytes of memory per document.
"""

from __future__ import annotations

from typing import Any

import chz
import numpy as np
from jaxtyping import Int

from recollect.data.text.rows.base import RowPlan, Sequences, Span, smallest_dtype
from recollect.data.text.rows.stable_random import permutation

_ORDER = 1


@chz.chz(typecheck=True)
class Chunked(Sequences):
    """Documents in one stream, cut into rows. With `document_mask` the documents of a row are kept apart; without it
    they attend to each other."""

    document_mask: bool = True

    def plan(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int) -> ChunkedPlan:
        return ChunkedPlan(lengths, length, seed, document_mask=self.document_mask)


class ChunkedPlan(RowPlan):
    """Rows of the concatenation.

    Args:
      lengths: tokens of each document.
      length: tokens per row.
      seed: decides the order of documents.
      document_mask: keep documents apart by segment ids; otherwise a row is one sequence, and attention crosses from
        document to document.
    """

    def __init__(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int, *, document_mask: bool):
        lengths = np.asarray(lengths, np.int64)
        self._order = smallest_dtype(permutation((seed, _ORDER), len(lengths)))
        # Where the document in each place of the order begins, and where the last one ends.
        self._begin = np.concatenate([[0], np.cumsum(lengths[self._order])])
        self.lengths = (length,)
        self.counts = (-(-int(self._begin[-1]) // length),)
        self.segmented = document_mask

    def spans(self, group: int, row: int) -> list[Span]:
        """See `RowPlan`."""
        begin = row * self.lengths[0]
        end = min(begin + self.lengths[0], int(self._begin[-1]))
        first = int(np.searchsorted(self._begin, begin, side="right")) - 1
        last = int(np.searchsorted(self._begin, end, side="left"))
        starts, stops = self._begin[first:last].tolist(), self._begin[first + 1 : last + 1].tolist()
        return [
            (document, max(begin - start, 0), min(end, stop) - start)
            for document, start, stop in zip(self._order[first:last].tolist(), starts, stops, strict=True)
            if stop > start
        ]

    def facts(self) -> dict[str, Any]:
        """Returns the number of rows, and of documents that lie in more than one of them."""
        length = self.lengths[0]
        begin, last = self._begin[:-1], np.maximum(self._begin[1:] - 1, self._begin[:-1])
        cut = int(np.count_nonzero(begin // length != last // length))
        return {**super().facts(), "documents_cut": cut, "documents": len(self._order)}
