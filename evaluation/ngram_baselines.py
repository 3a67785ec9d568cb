"""N-gram models of training text: a baseline, and the slice of targets that ask for recall.

Zoology (Arora, Eyuboglu et al., arXiv 2312.04927, section 3) splits a language model's loss by associative recall: a
token counts as a recall hit when it completes an n-gram seen earlier in the context which training data alone doesn't
teach. They take
    hit: the last token of a bigram that stands earlier in the context, and is not among the 1,250 most frequent in
      training
(`recall_bigrams`, for tokenizers of words and parts of words). For bytes, where bigrams say nothing, this project takes
    hit: the byte completes an 8-gram that stands earlier in its segment, and it is not the most frequent successor, in
    the training documents, of the 7 bytes before it
(`recall_slice`).

Models are fitted to `FIT_TOKENS` tokens at most, of documents spread over the corpus; results say to how many.

Easy to get wrong: "earlier" is within the same segment of the same row, as that is all the model sees; seven bytes that
training never had predict nothing, so their successors can be hits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from recollect.data.text.rows.base import Documents
from recollect.data.tokenizers import START

CONTEXT = 7
FREQUENT = 1250
FIT_TOKENS = 1 << 25
_BLOCK = 1 << 22


def documents_to_fit(documents: Documents, limit: int = FIT_TOKENS) -> Iterator[np.ndarray]:
    """Tokens of documents, each (n,) int32 with the opening one first: of all, or of every k-th so that about `limit`
    tokens come.

    A document is cut short where it would pass the limit.
    """
    total = int(documents.lengths.sum())
    left = limit
    for number in range(0, len(documents.lengths), max(1, total // limit)):
        if left <= 0:
            return
        tokens = documents.tokens(number, 0, min(int(documents.lengths[number]), left))
        left -= len(tokens)
        yield tokens


@dataclasses.dataclass(frozen=True)
class Bigram:
    """p(next token | token before it), smoothed as Witten and Bell (1991) do.

    p(b | a) = (c(a, b) + s(a) p(b)) / (c(a) + s(a)), with s(a) the number of different successors of a (at least 1) and
    p(b) the share of b among all successors, one added to each count. A document's first token follows the opening one,
    which itself follows nothing.

    Attributes:
      pairs, counts: (n,) a * vocabulary + b in ascending order, and how often.
      before, kinds: (vocabulary,) c(a) and s(a).
      alone: (vocabulary,) p(b).
      tokens: how many tokens it was fitted to, opening ones among them.
    """

    pairs: np.ndarray
    counts: np.ndarray
    before: np.ndarray
    kinds: np.ndarray
    alone: np.ndarray
    tokens: int

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray], vocabulary: int, start: int) -> Bigram:
        """Counts pairs within documents, each given as tokens with `start` first."""
        pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        waiting: list[np.ndarray] = []
        tokens = 0

        def merge() -> tuple[np.ndarray, np.ndarray]:
            new, often = np.unique(np.concatenate(waiting), return_counts=True) if waiting else (pairs[:0], counts[:0])
            both, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            return both, np.bincount(place, np.concatenate([counts, often]), len(both)).astype(np.int64)

        for document in documents:
            ids = np.asarray(document, np.int64)
            tokens += len(ids)
            waiting.append(ids[:-1] * vocabulary + ids[1:])
            if tokens // _BLOCK > (tokens - len(ids)) // _BLOCK:
                pairs, counts = merge()
                waiting = []
        pairs, counts = merge()
        left, right = np.divmod(pairs, vocabulary)
        alone = np.bincount(right, counts, vocabulary) + 1.0
        alone[start] = 0.0
        before = np.bincount(left, counts, vocabulary)
        return cls(
            pairs, counts, before, np.maximum(np.bincount(left, minlength=vocabulary), 1), alone / alone.sum(), tokens
        )

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Cross-entropy of each target in nats, shape of `targets`; for targets of weight 0 the number means
        nothing."""
        wanted = np.asarray(tokens, np.int64) * len(self.alone) + targets
        count = np.zeros(wanted.shape)
        if self.pairs.size:
            place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
            count = np.where(self.pairs[place] == wanted, self.counts[place], 0)
        kinds = self.kinds[tokens]
        # The opening token is a target in padding only.
        share = np.maximum(self.alone[targets], np.finfo(np.float64).tiny)
        return -np.log((count + kinds * share) / (self.before[tokens] + kinds))

    def frequent(self, count: int = FREQUENT) -> np.ndarray:
        """The most frequent pairs, (count,) a * vocabulary + b in ascending order; among equally frequent ones the
        smallest."""
        return np.sort(self.pairs[np.argsort(-self.counts, kind="stable")[:count]])


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """The most frequent next byte of each 7 bytes: contexts (n,) uint64 in ascending order, successors (n,) uint8."""

    contexts: np.ndarray
    successors: np.ndarray

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray]) -> NgramTable:
        """Counts 8-grams within documents, each given as byte tokens with START first; among equally frequent
        successors the smallest wins."""
        found = [_grams(np.asarray(document[1:], np.uint8)[None])[0] for document in documents]
        grams = np.concatenate([np.zeros(0, np.uint64), *found])
        del found
        grams.sort()
        first = (
            np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]])) if grams.size else np.zeros(0, np.int64)
        )
        counts = np.diff(np.append(first, grams.size))
        distinct = grams[first]
        del grams
        contexts = distinct >> np.uint64(8)
        # By context, then most frequent first; the sort is stable and `distinct` ascending, so the smallest byte wins
        # ties.
        order = np.lexsort((-counts, contexts))
        contexts, distinct = contexts[order], distinct[order]
        best = np.concatenate([[True], contexts[1:] != contexts[:-1]]) if contexts.size else np.zeros(0, bool)
        return cls(contexts[best], (distinct[best] & np.uint64(255)).astype(np.uint8))

    def predict(self, contexts: np.ndarray) -> np.ndarray:
        """Most frequent next byte of packed 7-byte contexts, int16 in their shape; -1 where training never had the
        context."""
        if not self.contexts.size:
            return np.full(contexts.shape, -1, np.int16)
        place = np.minimum(np.searchsorted(self.contexts, contexts), len(self.contexts) - 1)
        return np.where(self.contexts[place] == contexts, self.successors[place].astype(np.int16), np.int16(-1))


def recall_bigrams(
    tokens: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    segments: np.ndarray,
    frequent: np.ndarray,
    vocabulary: int,
) -> np.ndarray:
    """Which targets are recall hits by bigrams (see the module), (b, t) bool.

    Args:
      tokens, targets, weights, segments: (b, t) of a batch; targets of weight 0 are neither hits nor seen.
      frequent: pairs that are no hits, a * vocabulary + b in ascending order.
      vocabulary: number of ids.
    """
    hits = np.zeros(np.shape(tokens), bool)
    row, at = np.nonzero((np.asarray(weights) > 0) & (np.asarray(segments) != 0))
    pair = np.asarray(tokens, np.int64)[row, at] * vocabulary + np.asarray(targets)[row, at]
    segment = np.asarray(segments)[row, at]
    order = np.lexsort((at, pair, segment, row))
    row, at, pair, segment = row[order], at[order], pair[order], segment[order]
    seen = np.zeros(len(pair), bool)
    seen[1:] = (pair[1:] == pair[:-1]) & (segment[1:] == segment[:-1]) & (row[1:] == row[:-1])
    seen &= ~np.isin(pair, frequent)
    hits[row[seen], at[seen]] = True
    return hits


def recall_slice(tokens: np.ndarray, segments: np.ndarray | None, table: NgramTable) -> np.ndarray:
    """Which targets are recall hits (see the module), (b, t) bool.

    Args:
      tokens: (b, t) byte ids, START among them.
      segments: (b, t), 0 padding; None: one segment a row.
      table: of the training documents.

    Returns:
      True at position i where the target, tokens[i + 1], is a hit. The last position of a segment never is.

    Raises:
      ValueError: tokens and segments differ in shape.
    """
    tokens = np.asarray(tokens)
    segments = np.ones(tokens.shape, np.int32) if segments is None else np.asarray(segments)
    if tokens.ndim != 2 or segments.shape != tokens.shape:
        raise ValueError(
            f"segments: tokens have shape {tokens.shape} and segments {segments.shape}; both must be (b, t)"
        )
    hits = np.zeros(tokens.shape, bool)
    if tokens.shape[1] <= CONTEXT:
        return hits
    # Window i covers tokens i .. i + 7: it counts when all of them are bytes of one segment, and segments don't come
    # back.
    plain = (tokens < START) & (segments != 0)
    whole = np.lib.stride_tricks.sliding_window_view(plain, CONTEXT + 1, axis=1).all(axis=-1)
    whole &= segments[:, CONTEXT:] == segments[:, :-CONTEXT]
    grams = _grams(np.where(plain, tokens, 0).astype(np.uint8))
    row, start = np.nonzero(whole)
    gram = grams[row, start]
    order = np.lexsort((start, gram, segments[row, start], row))
    row, start, gram = row[order], start[order], gram[order]
    segment = segments[row, start]
    seen = np.zeros(len(gram), bool)
    seen[1:] = (gram[1:] == gram[:-1]) & (segment[1:] == segment[:-1]) & (row[1:] == row[:-1])
    seen &= table.predict(gram >> np.uint64(8)) != (gram & np.uint64(255)).astype(np.int16)
    hits[row[seen], start[seen] + CONTEXT - 1] = True
    return hits


def _grams(raw: np.ndarray) -> np.ndarray:
    """The 8 bytes from each place on as one number, first byte highest: (b, t) uint8 to (b, max(t - 7, 0)) uint64."""
    count = max(raw.shape[1] - CONTEXT, 0)
    packed = np.zeros((raw.shape[0], count), np.uint64)
    for offset in range(CONTEXT + 1 if count else 0):
        packed <<= np.uint64(8)
        packed |= raw[:, offset : offset + count]
    return packed
