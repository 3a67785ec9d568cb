"""N-gram models of training text: a baseline, and the slice of targets that ask for recall.

Zoology (Arora, Eyuboglu et al., arXiv 2312.04927, section 3) splits a language model's loss by associative recall: a
token is a recall hit when it completes an n-gram seen earlier in the context which training data alone doesn't teach.
They take
    hit: the last token of a bigram that stands earlier in the context, and is not among the 1,250 most frequent in
      training
(`recall_bigrams`, for tokenizers of words and parts of words). For bytes, where bigrams carry little, this project
takes
    hit: the byte completes an 8-gram that stands earlier in its segment, and it is not the most frequent successor, in
      the training documents, of the 7 bytes before it
(`recall_slice`).

Models are fitted to at most `FIT_TOKENS` tokens, of documents spread over the corpus; results record how many.

Easy to get wrong: "earlier" is within the same segment of the same row, as that is all the model sees; seven bytes that
never occurred in training predict nothing, so their successors can be hits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from recollect.data.batch import Batch
from recollect.data.text.rows.base import Documents
from recollect.data.text.token_files import TokenCorpus
from recollect.data.tokenizers import START, ByteTokenizer

if TYPE_CHECKING:
    from recollect.data.text.preparation.reader import Prepared

CONTEXT = 7
FREQUENT = 1250
FIT_TOKENS = 1 << 25


@functools.lru_cache(maxsize=2)
def fit_bigram(prepared: Prepared | TokenCorpus) -> Bigram:
    """Returns the bigram model of the training documents: the baseline that every model should beat."""
    tokenizer = prepared.tokenizer
    start = None if isinstance(prepared, TokenCorpus) else tokenizer.start
    return Bigram.fit(documents_to_fit(prepared.train), tokenizer.vocabulary, start)


@functools.lru_cache(maxsize=2)
def _frequent_pairs(prepared: Prepared | TokenCorpus) -> np.ndarray:
    return fit_bigram(prepared).frequent()


@functools.lru_cache(maxsize=2)
def _ngram_table(prepared: Prepared | TokenCorpus) -> NgramTable:
    return NgramTable.fit(documents_to_fit(prepared.train))


def recall_hits(prepared: Prepared | TokenCorpus, batch: Batch) -> Bool[np.ndarray, "b t"]:
    """Returns which targets of a held-out batch are recall hits (see the module)."""
    tokens, targets, weights, segments = (
        np.asarray(leaf) for leaf in (batch.tokens, batch.targets, batch.weights, batch.segments)
    )
    if isinstance(prepared.tokenizer, ByteTokenizer):
        return recall_slice(tokens, segments, _ngram_table(prepared))
    frequent = _frequent_pairs(prepared)
    return recall_bigrams(tokens, targets, weights, segments, frequent, prepared.tokenizer.vocabulary)


def documents_to_fit(documents: Documents, limit: int = FIT_TOKENS) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields the tokens of documents, the opening one first: of all, or of every k-th so that about `limit` come.

    A document is cut short where it would pass the limit.
    """
    left = limit
    for number in range(0, len(documents.lengths), max(1, int(documents.lengths.sum()) // limit)):
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
      pairs, counts: a * vocabulary + b in ascending order, and how often.
      before, successors: c(a) and s(a).
      alone: p(b).
      tokens: how many tokens it was fitted to, opening ones included.
    """

    pairs: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]
    before: Float[np.ndarray, " vocabulary"]
    successors: Int[np.ndarray, " vocabulary"]
    alone: Float[np.ndarray, " vocabulary"]
    tokens: int

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray], vocabulary: int, start: int | None) -> Bigram:
        """Returns the model of documents, each given as tokens with `start`, which is no target, first."""
        followed = [np.asarray(ids[:-1], np.int64) * vocabulary + ids[1:] for ids in documents]
        pairs, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *followed]), return_counts=True)
        left, right = np.divmod(pairs, vocabulary)
        alone = np.bincount(right, counts, vocabulary) + 1.0
        if start is not None:
            alone[start] = 0.0
        before = np.bincount(left, counts, vocabulary)
        successors = np.maximum(np.bincount(left, minlength=vocabulary), 1)
        return cls(pairs, counts, before, successors, alone / alone.sum(), int(counts.sum()) + len(followed))

    def loss(self, tokens: Int[np.ndarray, "*b"], targets: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """Returns the cross-entropy of each target in nats; without meaning for targets of weight 0."""
        pairs = np.asarray(tokens, np.int64) * len(self.alone) + targets
        count = _look_up(self.pairs, self.counts, pairs, otherwise=0)
        successors = self.successors[tokens]
        # The opening token is a target in padding only.
        share = np.maximum(self.alone[targets], np.finfo(np.float64).tiny)
        return -np.log((count + successors * share) / (self.before[tokens] + successors))

    def frequent(self, count: int = FREQUENT) -> Int[np.ndarray, " pairs"]:
        """Returns the `count` most frequent pairs, a * vocabulary + b, ascending; the smaller of equally frequent."""
        return np.sort(self.pairs[np.argsort(-self.counts, kind="stable")[:count]])


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """The most frequent next byte of each 7 bytes; contexts are packed and ascending."""

    contexts: UInt[np.ndarray, " n"]
    successors: Int[np.ndarray, " n"]

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray]) -> NgramTable:
        """Returns the table of documents, each given as byte tokens with START first.

        Among equally frequent successors the smallest wins.
        """
        grams = [_grams(np.asarray(document[1:], np.uint8)[None])[0] for document in documents]
        distinct, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]), return_counts=True)
        # By context, then most frequent first; the sort is stable and `distinct` ascending, so the smallest byte wins.
        distinct = distinct[np.lexsort((-counts, distinct >> np.uint64(8)))]
        contexts, best = np.unique(distinct >> np.uint64(8), return_index=True)
        return cls(contexts, (distinct[best] & np.uint64(255)).astype(np.int16))

    def predict(self, contexts: UInt[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """Returns the most frequent next byte of packed 7-byte contexts; -1 where training never had the context."""
        return _look_up(self.contexts, self.successors, contexts, otherwise=-1)


def _look_up(keys: np.ndarray, values: np.ndarray, sought: np.ndarray, otherwise: int) -> np.ndarray:
    """Returns the value of each sought key from ascending keys and their values; `otherwise` where there is none."""
    if not keys.size:
        return np.full(sought.shape, otherwise)
    place = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
    return np.where(keys[place] == sought, values[place], otherwise)


def recall_bigrams(
    tokens: Int[np.ndarray, "b t"],
    targets: Int[np.ndarray, "b t"],
    weights: Float[np.ndarray, "b t"],
    segments: Int[np.ndarray, "b t"],
    frequent: Int[np.ndarray, " pairs"],
    vocabulary: int,
) -> Bool[np.ndarray, "b t"]:
    """Returns which targets are recall hits by bigrams (see the module).

    Args:
      tokens, targets, weights, segments: of a batch; targets of weight 0 are neither hits nor seen.
      frequent: pairs that are no hits, a * vocabulary + b in ascending order.
      vocabulary: number of ids.
    """
    hits = np.zeros(tokens.shape, bool)
    row, at = np.nonzero((weights > 0) & (segments != 0))
    pair = np.asarray(tokens, np.int64)[row, at] * vocabulary + targets[row, at]
    seen = _seen_before(pair, at, segments[row, at], row) & ~np.isin(pair, frequent)
    hits[row[seen], at[seen]] = True
    return hits


def recall_slice(
    tokens: Int[np.ndarray, "b t"], segments: Int[np.ndarray, "b s"] | None, table: NgramTable
) -> Bool[np.ndarray, "b t"]:
    """Returns which targets are recall hits by 8-grams of bytes (see the module).

    Args:
      tokens: byte ids, START among them.
      segments: 0 for padding, t long; None for one segment per row.
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
    # Window i covers tokens i .. i + 7: it counts when all are bytes of one segment; a segment's tokens are contiguous.
    plain = (tokens < START) & (segments != 0)
    whole = np.lib.stride_tricks.sliding_window_view(plain, CONTEXT + 1, axis=1).all(axis=-1)
    whole &= segments[:, CONTEXT:] == segments[:, :-CONTEXT]
    grams = _grams(np.where(plain, tokens, 0).astype(np.uint8))
    row, start = np.nonzero(whole)
    gram = grams[row, start]
    seen = _seen_before(gram, start, segments[row, start], row)
    seen &= table.predict(gram >> np.uint64(8)) != (gram & np.uint64(255)).astype(np.int16)
    hits[row[seen], start[seen] + CONTEXT - 1] = True
    return hits


def _seen_before(
    gram: UInt[np.ndarray, " n"] | Int[np.ndarray, " n"],
    at: Int[np.ndarray, " n"],
    segment: Int[np.ndarray, " n"],
    row: Int[np.ndarray, " n"],
) -> Bool[np.ndarray, " n"]:
    """Returns which n-grams stand earlier in the same segment of the same row."""
    order = np.lexsort((at, gram, segment, row))
    seen = np.zeros(len(gram), bool)
    seen[order[1:]] = np.all([key[order][1:] == key[order][:-1] for key in (gram, segment, row)], axis=0)
    return seen


def _grams(raw: UInt[np.ndarray, "b t"]) -> UInt[np.ndarray, "b n"]:
    """Returns the 8 bytes from each place on as one number, the first byte highest."""
    if raw.shape[1] <= CONTEXT:
        return np.zeros((len(raw), 0), np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(raw, CONTEXT + 1, axis=1)
    return np.ascontiguousarray(windows).view(">u8")[..., 0].astype(np.uint64)
