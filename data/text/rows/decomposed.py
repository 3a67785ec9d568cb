"""Dataset Decomposition: documents cut into pieces of 2^k tokens, each a training sequence by itself, kept in a bucket
a length.

Pouransari et al., Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum, arXiv 2405.13226
(NeurIPS 2024),
section 3, with the details of their released code: while a document has n > 1 tokens left, it gives the next 2^k + 1 of
them to bucket k = floor(log2(n - 1)): 2^k inputs and their targets, the last of which is no input of the next piece.
Where k would pass the longest bucket, it is drawn from all buckets with probability proportional to 2^-k, that is,
equal expected tokens for each (or the longest one is taken, `randomise=False`). A rest too short for the shortest
bucket is dropped.

A sequence is one document's, so no mask is needed, nothing is padded, and a short document costs short attention. What
is dropped matters on corpora of
short documents: `facts()` tells the share that is kept.

Easy to get wrong: long documents are cut in rounds over all of them at once, each round drawing as many pieces as are
certain to fit, so time is linear in pieces; in memory stay 8 bytes a piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.data.text.rows.base import Plan, Span, smallest
from recollect.data.text.rows.stable_random import uniforms

_DRAWS = 2


class DecomposedPlan(Plan):
    """Buckets of pieces.

    Args:
      lengths: tokens of each document, (documents,).
      shortest, longest: powers of two, the inputs of the outermost buckets.
      seed: decides how documents longer than the longest bucket are cut.
      randomise: see the module.
    """

    segmented = False

    def __init__(self, lengths: np.ndarray, shortest: int, longest: int, seed: int, *, randomise: bool = True):
        lengths = np.asarray(lengths, np.int64)
        low, high = shortest.bit_length() - 1, longest.bit_length() - 1
        if shortest != 1 << low or longest != 1 << high or low > high:
            raise ValueError(f"shortest={shortest}, longest={longest}: must be powers of two in this order")
        documents, starts, powers = decompose(lengths, low, high, seed, randomise=randomise)
        self.lengths = tuple(1 << power for power in range(low, high + 1))
        self._documents, self._starts = [], []
        for power in range(low, high + 1):
            inside = powers == power
            self._documents.append(smallest(documents[inside]))
            self._starts.append(smallest(starts[inside]))
        self.counts = tuple(len(found) for found in self._documents)
        self._tokens = int(lengths.sum())
        self._possible = int(np.maximum(lengths - 1, 0).sum())

    def spans(self, group: int, row: int) -> list[Span]:
        """See `Plan`."""
        start = int(self._starts[group][row])
        return [(int(self._documents[group][row]), start, start + self.lengths[group])]

    def facts(self) -> dict[str, Any]:
        """Rows of each bucket, the share of all tokens that lie in some sequence, and the share of all targets that
        are trained on."""
        pairs = list(zip(self.lengths, self.counts, strict=True))
        kept = sum((length + 1) * count for length, count in pairs)
        targets = sum(length * count for length, count in pairs)
        return {
            **super().facts(),
            "rows_by_length": {str(length): count for length, count in pairs},
            "retained_share": kept / max(self._tokens, 1),
            "target_share": targets / max(self._possible, 1),
        }


def decompose(
    lengths: np.ndarray, low: int, high: int, seed: int, *, randomise: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into pieces of 2^k + 1 tokens, low <= k <= high.

    Returns:
      document, first token and k of each piece, (pieces,) each; a document's pieces in their order.
    """
    lengths = np.asarray(lengths, np.int64)
    at = np.zeros(len(lengths), np.int64)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    # p(k) proportional to 2^-k, summed up from the longest bucket on.
    shares = np.array([2.0 ** (high - power) for power in range(high, low - 1, -1)])
    bounds = np.cumsum(shares / shares.sum())
    rounds = 0
    while True:
        excess = (
            lengths - at - (2 << high)
        )  # a document is drawn for while floor(log2(n - 1)) > high: while n > 2^(high + 1)
        active = np.flatnonzero(excess > 0)
        if not active.size:
            break
        # However long each piece turns out, so many are drawn before the rest is short enough.
        times = -(-excess[active] // ((1 << high) + 1))
        powers = np.full(int(times.sum()), high, np.int64)
        if randomise:
            drawn = uniforms((seed, _DRAWS, rounds), len(powers))
            powers -= np.minimum(np.searchsorted(bounds, drawn, side="right"), high - low)
        sizes = (1 << powers) + 1
        ends = np.cumsum(sizes)
        first = np.cumsum(times) - times
        before = (ends - sizes)[first]
        found.append((np.repeat(active, times), np.repeat(at[active] - before, times) + ends - sizes, powers))
        at[active] += ends[first + times - 1] - before
        rounds += 1
    for power in range(high, low - 1, -1):
        # At most 2^(power + 1) tokens are left of any document, and fewer than half of them after its piece.
        taken = np.flatnonzero(lengths - at > 1 << power)
        found.append((taken, at[taken], np.full(len(taken), power, np.int64)))
        at[taken] += (1 << power) + 1
    documents, starts, powers = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((starts, documents))
    return documents[order], starts[order], powers[order]
