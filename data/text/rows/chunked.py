"""Concatenate and chunk: all documents one after the other in a random order, cut into rows of one length.

Every token but the last of all has a successor, and a row's last target is the next row's first token: nothing is
wasted but the end of the last row. A document that a cut divides goes on in another row without what came before. In
memory stay 16 bytes a document.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.data.text.rows.base import Plan, Span, smallest
from recollect.data.text.rows.stable_random import permutation

_ORDER = 1


class ChunkedPlan(Plan):
    """Rows of the concatenation.

    Args:
      lengths: tokens of each document, (documents,).
      length: tokens a row.
      seed: decides the order of documents.
      document_mask: keep documents apart by segment ids; otherwise a row is one sequence, and attention crosses from
        document to document.
    """

    def __init__(self, lengths: np.ndarray, length: int, seed: int, *, document_mask: bool):
        lengths = np.asarray(lengths, np.int64)
        self._order = smallest(permutation((seed, _ORDER), len(lengths)))
        # Where the document in each place of the order begins, and where the last one ends.
        self._begin = np.concatenate([[0], np.cumsum(lengths[self._order])])
        self.lengths = (length,)
        self.counts = (-(-int(self._begin[-1]) // length),)
        self.segmented = document_mask
        self._documents = len(lengths)

    def spans(self, group: int, row: int) -> list[Span]:
        """See `Plan`."""
        begin = row * self.lengths[0]
        end = min(begin + self.lengths[0], int(self._begin[-1]))
        first = int(np.searchsorted(self._begin, begin, side="right")) - 1
        last = int(np.searchsorted(self._begin, end, side="left"))
        spans = []
        for place in range(first, last):
            start, stop = int(self._begin[place]), int(self._begin[place + 1])
            if stop > start:
                spans.append((int(self._order[place]), max(begin - start, 0), min(end, stop) - start))
        return spans

    def facts(self) -> dict[str, Any]:
        """Rows, and documents that lie in more than one of them."""
        length = self.lengths[0]
        begin, last = self._begin[:-1], np.maximum(self._begin[1:] - 1, self._begin[:-1])
        return {
            **super().facts(),
            "documents_cut": int(np.count_nonzero(begin // length != last // length)),
            "documents": self._documents,
        }
