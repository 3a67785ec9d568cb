"""Dataset Decomposition: documents cut into pieces of 2^k tokens, each a training sequence, in a bucket per length.

Pouransari et al., Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum, arXiv 2405.13226
(NeurIPS 2024), section 3, with the details of their released code: while a document has n > 1 tokens left, it gives the
next 2^k + 1 of them to bucket k = floor(log2(n - 1)): 2^k inputs and their targets, the last of which is no input of
the next piece. Where k would pass the longest bucket, it is drawn from all buckets with probability proportional to
2^-k, that is, equal expected tokens for each (or the longest one is taken, `randomise=False`). A rest too short for the
shortest bucket is dropped.

A sequence is one document's, so no mask is needed, nothing is padded, and a short document costs short attention. What
is dropped matters on corpora of short documents: `facts()` has the share that is kept.

Easy to get wrong: long documents are cut in rounds over all of them at once, each round drawing as many pieces as are
certain to fit, so time is linear in pieces; a plan takes 8 bytes of memory per piece.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import chz
import numpy as np
from jaxtyping import Int

from recollect.configuration import UserError, at_least
from recollect.data.text.rows.base import RowPlan, Sequences, Span, smallest_dtype
from recollect.data.text.rows.stable_random import uniforms

Curriculum = Literal["uniform", "grow_linear", "grow_p2", "grow_p100"]
_DRAWS = 2


@chz.chz(typecheck=True)
class Decomposed(Sequences):
    """Dataset Decomposition; the longest bucket is the data's `length`, a power of two.

    Attributes:
      shortest: inputs of the shortest bucket, a power of two; rests of documents that are shorter are dropped.
      curriculum: odds from the shortest to the longest of n buckets: "uniform" 1:1:...:1, "grow_linear" n:...:2:1,
        "grow_p2" 2^(n-1):...:2:1, "grow_p100" 100^(n-1):...:100:1 (powers of 100, as its name says).
      cycles: cycles in an epoch. The paper counts them in a whole run: a run of a tenth of an epoch sees eight of them
        with cycles=80.
      odds: "raw" as the paper's Algorithm 1; "by_tokens" multiplies by each bucket's tokens as the authors' code does.
        (They agree where all buckets hold the same number of tokens.)
      randomise: cut documents beyond the longest bucket into pieces of random length, not into longest ones.
    """

    shortest: int = 256
    curriculum: Curriculum = "grow_p2"
    cycles: int = chz.field(default=8, validator=at_least(1))
    odds: Literal["raw", "by_tokens"] = "raw"
    randomise: bool = True

    @chz.validate
    def _ranges(self) -> None:
        if self.shortest < 2 or self.shortest & (self.shortest - 1):
            raise UserError(
                f"shortest={self.shortest}: must be a power of two, at least 2; the nearest is "
                f"{_nearest_power(self.shortest)}"
            )

    def check(self, length: int) -> None:
        """Raises UserError if `length` is no power of two or shorter than the shortest bucket."""
        if length & (length - 1):
            raise UserError(
                f"length={length}: Decomposed has buckets of powers of two, and the longest is `length`; the nearest "
                f"is {_nearest_power(length)}"
            )
        if length < self.shortest:
            raise UserError(
                f"length={length}: the longest bucket is shorter than the shortest, sequences.shortest={self.shortest}"
            )

    def plan(self, lengths: Int[np.ndarray, " documents"], length: int, seed: int) -> DecomposedPlan:
        plan = DecomposedPlan(lengths, self.shortest, length, seed, randomise=self.randomise)
        if not any(plan.counts):
            raise UserError(
                f"sequences.shortest={self.shortest}: no document has more tokens than that, the longest has "
                f"{int(max(lengths))}"
            )
        return plan

    def shares(self, plan: RowPlan) -> tuple[int, tuple[float, ...]]:
        ranks = np.arange(len(plan.lengths))[::-1].astype(float)
        powers = {"uniform": 1.0, "grow_p2": 2.0, "grow_p100": 100.0}
        odds = ranks + 1 if self.curriculum == "grow_linear" else powers[self.curriculum] ** ranks
        if self.odds == "by_tokens":
            odds = odds * plan.lengths * plan.counts
        return self.cycles, tuple(odds.tolist())


class DecomposedPlan(RowPlan):
    """Buckets of pieces.

    Args:
      lengths: tokens of each document.
      shortest, longest: powers of two, the inputs of the outermost buckets.
      seed: decides how documents longer than the longest bucket are cut.
      randomise: see the module.
    """

    segmented = False

    def __init__(
        self,
        lengths: Int[np.ndarray, " documents"],
        shortest: int,
        longest: int,
        seed: int,
        *,
        randomise: bool = True,
    ):
        lengths = np.asarray(lengths, np.int64)
        low, high = shortest.bit_length() - 1, longest.bit_length() - 1
        if shortest != 1 << low or longest != 1 << high or low > high:
            raise ValueError(f"shortest={shortest}, longest={longest}: must be powers of two in this order")
        documents, starts, powers = decompose(lengths, low, high, seed, randomise=randomise)
        self.lengths = tuple(1 << power for power in range(low, high + 1))
        # Document and first token of each piece, by bucket.
        self._pieces = [
            (smallest_dtype(documents[powers == power]), smallest_dtype(starts[powers == power]))
            for power in range(low, high + 1)
        ]
        self.counts = tuple(len(documents) for documents, _ in self._pieces)
        self._tokens = int(lengths.sum())
        self._possible = int(np.maximum(lengths - 1, 0).sum())

    def spans(self, group: int, row: int) -> list[Span]:
        """See `RowPlan`."""
        document, start = (int(numbers[row]) for numbers in self._pieces[group])
        return [(document, start, start + self.lengths[group])]

    def facts(self) -> dict[str, Any]:
        """Returns the rows of each bucket, and the shares of all tokens in some row and of all targets trained on."""
        targets = sum(length * count for length, count in zip(self.lengths, self.counts, strict=True))
        return {
            **super().facts(),
            "rows_by_length": dict(zip(map(str, self.lengths), self.counts, strict=True)),
            "retained_share": (targets + sum(self.counts)) / max(self._tokens, 1),
            "target_share": targets / max(self._possible, 1),
        }


def decompose(
    lengths: Int[np.ndarray, " documents"], low: int, high: int, seed: int, *, randomise: bool
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Cuts documents into pieces of 2^k + 1 tokens, low <= k <= high.

    Returns:
      document, first token and k of each piece; a document's pieces in their order.
    """
    lengths = np.asarray(lengths, np.int64)
    at = np.zeros(len(lengths), np.int64)
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    # p(k) proportional to 2^-k, summed up from the longest bucket on.
    shares = 2.0 ** np.arange(high - low + 1)
    bounds = np.cumsum(shares / shares.sum())
    for rounds in itertools.count():
        # Lengths are drawn while floor(log2(n - 1)) > high, that is, while n > 2^(high + 1).
        excess = lengths - at - (2 << high)
        active = np.flatnonzero(excess > 0)
        if not active.size:
            break
        # However long each piece turns out, at least so many are drawn before the rest is short enough.
        times = -(-excess[active] // ((1 << high) + 1))
        powers = np.full(int(times.sum()), high, np.int64)
        if randomise:
            drawn = uniforms((seed, _DRAWS, rounds), len(powers))
            powers -= np.minimum(np.searchsorted(bounds, drawn, side="right"), high - low)
        sizes = (1 << powers) + 1
        ends = np.cumsum(sizes)
        first = np.cumsum(times) - times
        before = (ends - sizes)[first]
        pieces.append((np.repeat(active, times), np.repeat(at[active] - before, times) + ends - sizes, powers))
        at[active] += ends[first + times - 1] - before
    for power in range(high, low - 1, -1):
        # At most 2^(power + 1) tokens are left of any document, and fewer than half of them after its piece.
        taken = np.flatnonzero(lengths - at > 1 << power)
        pieces.append((taken, at[taken], np.full(len(taken), power, np.int64)))
        at[taken] += (1 << power) + 1
    documents, starts, powers = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    order = np.lexsort((starts, documents))
    return documents[order], starts[order], powers[order]


def _nearest_power(number: int) -> int:
    """Returns the power of two, at least 2, that is nearest to a number."""
    below = 1 << max(number, 2).bit_length() - 1
    return below if number - below <= 2 * below - number else 2 * below
