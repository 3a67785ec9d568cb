"""The held-out text that an evaluation measures: chosen in bytes, so that it is the same for every tokenizer, row
length and batch size.

    text = HeldOutText(prepared.held_out, limit=200_000)      # limit None: all held-out text
    for batch, sizes, documents in text.batches(length=512, batch_size=8): ...

Held-out documents are divided into pieces at fixed bytes, and pieces are taken in one fixed random order until the
limit, the last one as far as the limit. Pieces that adjoin are measured as one. Each is packed into rows with the token
before it as its first input, so every token that lies in it is a target once.

Easy to get wrong: a token may lie across the end of a piece. Its weight is the share of its bytes inside, so that the
bytes measured are exactly those chosen, whatever the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from recollect.data.batch import Batch
from recollect.data.text.rows import Packed, read_rows
from recollect.data.text.rows.base import Documents
from recollect.data.text.rows.stable_random import permutation

PIECES, SHORTEST_PIECE = 64, 4096
"""An evaluation is spread over about so many places of the text, each of at least so many bytes."""

_ORDER = (0, 5)

Piece = tuple[int, int, int]
"""(document, first byte, end byte)."""


class MeasuredBatch(NamedTuple):
    """A batch, the bytes of text that each of its targets stands for, and the number of the held-out document that the
    target is of; both are 0 where there is none."""

    batch: Batch
    sizes: Int[np.ndarray, "b t"]
    documents: Int[np.ndarray, "b t"]


class SizedDocuments(Documents, Protocol):
    """Documents that know their bytes; see `recollect.data.text.preparation.reader.TokenDocuments`."""

    byte_lengths: Int[np.ndarray, " documents"]

    def token_bytes(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns how many bytes of text tokens `start` to `stop` of a document stand for."""


def choose(byte_lengths: Int[np.ndarray, " documents"], limit: int | None) -> list[Piece]:
    """Returns the pieces of documents of `byte_lengths` bytes that an evaluation of `limit` bytes measures.

    They are in the order of the text, and none adjoins another.
    """
    sizes = np.asarray(byte_lengths, np.int64)
    if limit is None or limit >= sizes.sum():
        return [(document, 0, int(sizes[document])) for document in np.flatnonzero(sizes).tolist()]
    length = max(SHORTEST_PIECE, limit // PIECES)
    ends = np.cumsum(-(-sizes // length))
    chosen: list[Piece] = []
    for number in permutation(_ORDER, int(ends[-1])).tolist():
        document = int(np.searchsorted(ends, number, side="right"))
        begin = (number - int(ends[document - 1] if document else 0)) * length
        end = min(begin + length, int(sizes[document]), begin + limit)
        chosen.append((document, begin, end))
        limit -= end - begin
        if not limit:
            break
    return _joined(sorted(chosen))


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for document, begin, end in pieces:
        if joined and joined[-1][0] == document and joined[-1][2] == begin:
            begin = joined.pop()[1]
        joined.append((document, begin, end))
    return joined


class HeldOutText:
    """Pieces of documents, each as tokens like a document: the one before the piece, then those in it.

    Attributes:
      lengths: tokens of each piece, the one before it included.

    Args:
      documents: the held-out documents.
      limit: bytes; None for all.
    """

    def __init__(self, documents: SizedDocuments, limit: int | None):
        self._documents = documents
        pieces = choose(documents.byte_lengths, limit)
        spans = [self._span(*piece) for piece in pieces]
        self._where = [(document, first) for (document, _, _), (first, _, _) in zip(pieces, spans, strict=True)]
        self._shares = [shares for _, _, shares in spans]
        self.lengths = np.array([last + 1 - first for first, last, _ in spans], np.int64)

    def _span(self, document: int, begin: int, end: int) -> tuple[int, int, tuple[float, float]]:
        """Returns the token before a piece, the last one in it, and the shares of its first and last that lie in it."""
        final = int(self._documents.lengths[document]) - 1
        whole = end == int(self._documents.byte_lengths[document])
        if begin == 0 and whole:
            return 0, final, (1.0, 1.0)
        ends = np.cumsum(self._documents.token_bytes(document, 0, final + 1))
        first = 1 if begin == 0 else int(np.searchsorted(ends, begin, side="right"))
        # A token without bytes of its own belongs to what stands before it.
        last = max(int(np.searchsorted(ends, end, side="right")) - 1, int(np.searchsorted(ends, end)))
        last = final if whole else min(last, final)
        first = min(first, last)

        def share(token: int) -> float:
            size = int(ends[token] - ends[token - 1])
            return (min(end, int(ends[token])) - max(begin, int(ends[token - 1]))) / size if size else 1.0

        return first - 1, last, (share(first), share(last))

    def tokens(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns tokens `start` to `stop` of a piece."""
        number, first = self._where[document]
        return self._documents.tokens(number, first + start, first + stop)

    def batches(self, length: int, batch_size: int) -> Iterator[MeasuredBatch]:
        """Yields the pieces packed into rows of `length` tokens; the last batch is filled with padding."""
        plan = Packed().plan(self.lengths, length, 0)
        rows = plan.counts[0]
        for begin in range(0, rows, batch_size):
            spans = [plan.spans(0, row) for row in range(begin, min(begin + batch_size, rows))]
            batch = read_rows(self, spans, batch_size, length)
            weights: Any = batch.weights
            sizes, documents = np.zeros((2, batch_size, length), np.int64)
            for row, of_row in enumerate(spans):
                at = 0
                for piece, start, stop in of_row:
                    self._measure(piece, start, stop, sizes[row, at:], weights[row, at:])
                    documents[row, at : at + stop - start] = self._where[piece][0]
                    at += stop - start
            yield MeasuredBatch(batch, sizes, documents)

    def _measure(self, piece: int, start: int, stop: int, sizes: np.ndarray, weights: np.ndarray) -> None:
        """Writes the bytes of the targets of a row's inputs `start` to `stop`, and the weights of the outer ones."""
        document, first = self._where[piece]
        end = min(stop + 1, int(self.lengths[piece]))
        count = end - (start + 1)
        sizes[:count] = self._documents.token_bytes(document, first + start + 1, first + end)
        if start == 0 and count:
            weights[0] = self._shares[piece][0]
        if end == self.lengths[piece] and count:
            weights[count - 1] = self._shares[piece][1]
