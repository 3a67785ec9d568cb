"""Documents of any length into rows of one length.

Each document is cut into pieces of at most `length` tokens, one after the other from its start, and pieces that fill a row only
partly share rows: a row takes the longest piece left, then again and again the longest that still fits ("best fit, longest
first"; Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, pack so too). Pieces are numbered 1, 2, ... within
their row as segments, 0 is padding, and no target crosses from one to the next.

Easy to get wrong: pieces of one document are separate segments, wherever they lie; the first token of a piece is no target.
Who shares a row doesn't matter to a model that keeps segments apart, so the rows stay the same from epoch to epoch and only
their order changes. That makes reading row r a pure function of r, which is what lets an iterator continue from a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data.tokenizers import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of documents: document index, first token and end token within it, each (pieces,)."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def cut(lengths: np.ndarray, length: int) -> Pieces:
    """Cuts documents of `lengths` tokens each into pieces of at most `length` tokens.

    Raises:
      ValueError: `length` is not positive.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1")
    lengths = np.asarray(lengths, np.int64)
    counts = -(-lengths // length)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * length
    return Pieces(document, start, np.minimum(start + length, lengths[document]))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row r holds the pieces `order[begin[r]:begin[r + 1]]`."""

    order: np.ndarray
    begin: np.ndarray

    def __len__(self) -> int:
        return len(self.begin) - 1

    def pieces(self, row: int) -> np.ndarray:
        return self.order[self.begin[row] : self.begin[row + 1]]


def pack(sizes: np.ndarray, length: int) -> Rows:
    """Shares out pieces of `sizes` tokens into rows of `length`: each piece once, deterministic.

    Raises:
      ValueError: a piece is empty or longer than a row.
    """
    sizes = np.asarray(sizes, np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > length):
        raise ValueError(f"sizes: each must be between 1 and length={length}, found {sizes.min()} .. {sizes.max()}")
    order: list[int] = np.flatnonzero(sizes == length).tolist()
    begin = list(range(len(order) + 1))
    # Pieces that share rows, by size; last in, first out, so turned around.
    left: dict[int, list[int]] = {}
    for index in np.flatnonzero(sizes < length)[::-1]:
        left.setdefault(int(sizes[index]), []).append(int(index))
    # Bit s is set while a piece of size s is left: the longest that fits is then the highest bit below a bound.
    present = sum(1 << size for size in left)
    while present:
        room = length
        while fitting := present & ((1 << (room + 1)) - 1):
            size = fitting.bit_length() - 1
            order.append(left[size].pop())
            room -= size
            if not left[size]:
                present &= ~(1 << size)
        begin.append(len(order))
    return Rows(np.array(order, np.int64), np.array(begin, np.int64))


class PackedRows:
    """Rows of packed pieces by number: what Grain takes as a random-access source.

    Args:
      documents: each document's bytes.
      lengths: tokens of each document, (documents,).
      length: tokens a row.
    """

    def __init__(self, documents: Sequence[bytes], lengths: np.ndarray, length: int):
        self.documents = documents
        self.length = length
        self.tokenizer = ByteTokenizer()
        self.cut = cut(lengths, length)
        self.rows = pack(self.cut.stop - self.cut.start, length)
        self.fill = float(np.sum(lengths)) / max(len(self.rows) * length, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens and segments of one row, both (length,) int32."""
        tokens = np.zeros(self.length, np.int32)
        segments = np.zeros(self.length, np.int32)
        at = 0
        for number, piece in enumerate(self.rows.pieces(int(row)), start=1):
            start, stop = int(self.cut.start[piece]), int(self.cut.stop[piece])
            end = at + stop - start
            tokens[at:end] = self.tokenizer.encode(self.documents[int(self.cut.document[piece])], start, stop)
            segments[at:end] = number
            at = end
        return {"tokens": tokens, "segments": segments}


def next_token_targets(tokens: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets (b, t) int32, each the next token of its segment, and weights (b, t) float32, 0 where a segment ends and in padding."""
    inside = np.zeros(tokens.shape, bool)
    inside[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] != 0)
    following = np.zeros_like(tokens)
    following[:, :-1] = tokens[:, 1:]
    return np.where(inside, following, 0).astype(np.int32), inside.astype(np.float32)
