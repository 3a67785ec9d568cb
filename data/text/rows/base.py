"""Plans of training rows: rows by number, each a list of spans of documents, in groups of one row length.

A plan is made once from (seed, document lengths). Reading row i of a group is random access, so any process can read
any row, and nothing but the row's number has to be remembered between runs.

Targets are the same for every plan: a token's target is the next token of its document, inside the row or not, so a row
holds the last token's target without holding that token as an input. The token that opens a document is never a target,
nor is anything beyond a document's end. Each byte of text is a target at most once per epoch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, Protocol

import chz
import numpy as np
from jaxtyping import Int

from recollect.configuration import Config
from recollect.data.batch import Batch

Span = tuple[int, int, int]
"""(document, first token, end token) of the inputs that a row takes from one document."""


class Documents(Protocol):
    """Tokenised documents by number; see `recollect.data.text.preparation.reader.TokenDocuments`."""

    lengths: Int[np.ndarray, " documents"]

    def tokens(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns tokens `start` to `stop` of a document."""


class RowPlan:
    """Base of the plans.

    Attributes:
      lengths: tokens per row of each group, ascending.
      counts: rows of each group.
      segmented: whether rows carry segment ids (1, 2, ... by span, 0 padding), which keep documents apart.
      continues: whether a row of a batch goes on where that of the batch before ended.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    segmented: bool
    continues: bool = False

    def spans(self, group: int, row: int) -> list[Span]:
        """Returns the spans of one row in their order; together at most `lengths[group]` tokens."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Returns what a run's result says of its rows, JSON-ready."""
        return {"rows": int(sum(self.counts))}


@chz.chz(typecheck=True)
class Sequences(Config):
    """Base of the configs that say how documents become rows."""

    def check(self, length: int) -> None:
        """Raises UserError if rows of `length` tokens cannot be made this way."""

    @abc.abstractmethod
    def plan(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int) -> RowPlan:
        """Returns the rows of documents of `lengths` tokens each."""

    def shares(self, plan: RowPlan) -> tuple[int, tuple[float, ...]]:
        """Returns the cycles that an epoch is divided into, and the odds of each group of rows."""
        return 1, (1.0,) * len(plan.lengths)


def read_rows(
    documents: Documents, spans: Iterable[list[Span]], rows: int, length: int, *, segmented: bool = True
) -> Batch:
    """Returns a batch of NumPy arrays, (rows, length) each.

    Args:
      spans: of each row, which it holds one after the other; what is left of a row, and rows without spans, are padding
        (token 0, weight 0, segment 0).
      segmented: whether the batch has segment ids.
    """
    tokens, targets, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
    weights = np.zeros((rows, length), np.float32)
    for row, of_row in enumerate(spans):
        at = 0
        for number, (document, start, stop) in enumerate(of_row, start=1):
            ids = documents.tokens(document, start, min(stop + 1, int(documents.lengths[document])))
            end, labelled = at + stop - start, at + len(ids) - 1
            tokens[row, at:end] = ids[: stop - start]
            targets[row, at:labelled] = ids[1:]
            weights[row, at:labelled] = 1
            segments[row, at:end] = number
            at = end
    arrays: Any = (tokens, targets, None, weights, segments if segmented else None)
    return Batch(*arrays)


def smallest_dtype(numbers: np.ndarray) -> np.ndarray:
    """Returns non-negative integers in 4 bytes each where they fit, else in 8, to keep large plans in memory."""
    return numbers.astype(np.uint32 if numbers.size == 0 or int(numbers.max()) < 2**32 else np.int64)
