"""Byte n-gram models: a baseline, and the slice of bytes that ask for recall.

Zoology (Arora, Eyuboglu et al., arXiv 2312.04927, section 3) splits a language model's loss by associative recall: a token counts as a
recall hit when it completes an n-gram seen earlier in the context which training data alone doesn't teach. For words they take
bigrams that are rare in training. For bytes, where bigrams say nothing, this project takes
    hit: the byte completes an 8-gram that stands earlier in its segment, and it is not the most frequent successor, in the
    training documents, of the 7 bytes before it.

Easy to get wrong: "earlier" is within the same segment of the same row, as that is all the model sees; seven bytes that training never had
predict nothing, so their successors can be hits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data.tokenizers import START

CONTEXT = 7


@dataclasses.dataclass(frozen=True)
class Bigram:
    """log p(next byte | token before it), natural logarithm, (257, 257); a document's first byte follows START."""

    log_probability: np.ndarray

    @classmethod
    def fit(cls, documents: Iterable[bytes]) -> Bigram:
        """Counts byte pairs, one added to each of the 256 possible successors."""
        counts = np.zeros(257 * 256, np.int64)
        for document in documents:
            raw = np.frombuffer(document, np.uint8).astype(np.int64)
            if raw.size:
                before = np.concatenate([[START], raw[:-1]])
                counts += np.bincount(before * 256 + raw, minlength=257 * 256)
        smoothed = counts.reshape(257, 256) + 1.0
        table = np.full((257, 257), -np.inf)
        # START never follows anything within a document.
        table[:, :256] = np.log(smoothed) - np.log(smoothed.sum(axis=1, keepdims=True))
        return cls(table)

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Cross-entropy of each target in nats, shape of `targets`; for targets of weight 0 the number means nothing."""
        return -self.log_probability[tokens, targets]

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean over every byte of every document, first bytes included."""
        nats, count = 0.0, 0
        for document in documents:
            raw = np.frombuffer(document, np.uint8).astype(np.int64)
            if raw.size:
                nats += float(self.loss(np.concatenate([[START], raw[:-1]]), raw).sum())
                count += raw.size
        return nats / np.log(2) / max(count, 1)


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """The most frequent next byte of each 7 bytes: contexts (n,) uint64 in ascending order, successors (n,) uint8."""

    contexts: np.ndarray
    successors: np.ndarray

    @classmethod
    def fit(cls, documents: Sequence[bytes]) -> NgramTable:
        """Counts 8-grams within documents; among equally frequent successors the smallest byte wins."""
        grams = np.empty(sum(max(len(document) - CONTEXT, 0) for document in documents), np.uint64)
        at = 0
        for document in documents:
            found = _grams(np.frombuffer(document, np.uint8)[None])[0]
            grams[at : at + len(found)] = found
            at += len(found)
        grams.sort()
        first = np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]])) if grams.size else np.zeros(0, np.int64)
        counts = np.diff(np.append(first, grams.size))
        distinct = grams[first]
        del grams
        contexts = distinct >> np.uint64(8)
        # By context, then most frequent first; the sort is stable and `distinct` ascending, so the smallest byte wins ties.
        order = np.lexsort((-counts, contexts))
        contexts, distinct = contexts[order], distinct[order]
        best = np.concatenate([[True], contexts[1:] != contexts[:-1]]) if contexts.size else np.zeros(0, bool)
        return cls(contexts[best], (distinct[best] & np.uint64(255)).astype(np.uint8))

    def predict(self, contexts: np.ndarray) -> np.ndarray:
        """Most frequent next byte of packed 7-byte contexts, int16 in their shape; -1 where training never had the context."""
        if not self.contexts.size:
            return np.full(contexts.shape, -1, np.int16)
        place = np.minimum(np.searchsorted(self.contexts, contexts), len(self.contexts) - 1)
        return np.where(self.contexts[place] == contexts, self.successors[place].astype(np.int16), np.int16(-1))


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
        raise ValueError(f"segments: tokens have shape {tokens.shape} and segments {segments.shape}; both must be (b, t)")
    hits = np.zeros(tokens.shape, bool)
    if tokens.shape[1] <= CONTEXT:
        return hits
    # Window i covers tokens i .. i + 7: it counts when all of them are bytes of one segment, and segments don't come back.
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
