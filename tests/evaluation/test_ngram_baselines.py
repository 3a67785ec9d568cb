"""The bigram model and the 7-byte table against counting by hand, and the recall slices on made-up rows."""

import collections
import itertools
import math

import numpy as np
import pytest

from recollect.data.tokenizers import START
from recollect.evaluation.ngram_baselines import (
    CONTEXT,
    Bigram,
    NgramTable,
    documents_to_fit,
    recall_bigrams,
    recall_slice,
)
from tests.data.text.documents import CountedDocuments


def random_documents(seed, count=12, letters=3):
    random = np.random.default_rng(seed)
    return [np.append(START, random.integers(97, 97 + letters, int(random.integers(0, 200)))) for _ in range(count)]


def document(raw):
    return np.append(START, np.frombuffer(raw, np.uint8))


def test_bigram_against_counting():
    train, held_out = random_documents(0), random_documents(1)
    pairs = collections.Counter(pair for tokens in train for pair in itertools.pairwise(tokens.tolist()))
    before, kinds, after = collections.Counter(), collections.Counter(), collections.Counter()
    for (left, right), count in pairs.items():
        before[left] += count
        kinds[left] += 1
        after[right] += count

    def probability(left, right):
        alone = (after[right] + 1) / (sum(after.values()) + 256)
        kind = max(kinds[left], 1)
        return (pairs[left, right] + kind * alone) / (before[left] + kind)

    model = Bigram.fit(train, 257, START)
    assert model.tokens == sum(map(len, train))
    for tokens in held_out:
        expected = [-math.log(probability(*pair)) for pair in itertools.pairwise(tokens.tolist())]
        assert model.loss(tokens[:-1], tokens[1:]) == pytest.approx(np.array(expected), rel=1e-12)
    for left in (97, 5, START):  # 5 never stood in training
        assert np.exp(-model.loss(np.full(256, left), np.arange(256))).sum() == pytest.approx(1)
    ranked = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:4]
    assert sorted(int(left) * 257 + right for left, right in ranked) == model.frequent(4).tolist()


def test_documents_to_fit_are_spread_and_bounded():
    documents = CountedDocuments([10] * 100)
    assert [len(tokens) for tokens in documents_to_fit(documents, 10**6)] == [10] * 100
    taken = list(documents_to_fit(documents, 95))
    assert sum(map(len, taken)) == 95 and [int(tokens[0]) // 1000 for tokens in taken] == list(range(0, 100, 10))
    assert [len(tokens) for tokens in documents_to_fit(CountedDocuments([500]), 95)] == [95]


def test_table_against_counting():
    documents = random_documents(2, count=30, letters=2)
    successors = collections.defaultdict(collections.Counter)
    for tokens in documents:
        raw = bytes(tokens[1:].tolist())
        for at in range(len(raw) - CONTEXT):
            successors[raw[at : at + CONTEXT]][raw[at + CONTEXT]] += 1
    table = NgramTable.fit(documents)
    assert len(table.contexts) == len(successors) > 100
    contexts = np.array([int.from_bytes(context, "big") for context in successors], np.uint64)
    expected = [min(counter, key=lambda byte: (-counter[byte], byte)) for counter in successors.values()]
    assert table.predict(contexts).tolist() == expected
    assert table.predict(np.array([5], np.uint64)).tolist() == [-1]


def test_top_bytes_do_not_overflow():
    table = NgramTable.fit([document(b"\xff" * 7 + b"\xfe")])
    assert table.predict(np.array([2**56 - 1], np.uint64)).tolist() == [0xFE]
    assert NgramTable.fit([document(b"short")]).predict(np.array([0], np.uint64)).tolist() == [-1]


def test_recall_by_bigrams_against_searching():
    random = np.random.default_rng(5)
    tokens, targets = random.integers(0, 6, (2, 3, 80))
    weights = (random.random((3, 80)) < 0.9).astype(np.float32)
    segments = np.sort(random.integers(1, 4, (3, 80)), axis=1)
    segments[:, 75:] = 0
    frequent = np.array([7, 8, 20])
    expected = np.zeros((3, 80), bool)
    for b in range(3):
        seen = set()
        for at in range(80):
            if weights[b, at] and segments[b, at]:
                pair = int(tokens[b, at] * 6 + targets[b, at])
                expected[b, at] = (segments[b, at], pair) in seen and pair not in frequent
                seen.add((segments[b, at], pair))
    found = recall_bigrams(tokens, targets, weights, segments, frequent, 6)
    assert (found == expected).all() and 20 < expected.sum() < 200


def row(text, segments=None):
    tokens = np.array([[START if char == "^" else ord(char) for char in text]])
    return tokens, None if segments is None else np.array([[int(char) for char in segments]])


def test_recall_slice_by_hand():
    table = NgramTable.fit([document(b"xxabcdefgZ"), document(b"--1234567!")])
    # The second time around, "9" follows "abcdefg" again: training says Z, so only the context tells.
    tokens, _ = row("^abcdefg9..abcdefg9")
    hits = recall_slice(tokens, None, table)
    assert np.flatnonzero(hits[0]).tolist() == [17]  # the position whose target is the second "9"
    # Training predicts "!" itself, so a repeat of it is no hit.
    tokens, _ = row("^1234567!..1234567!")
    assert not recall_slice(tokens, None, table).any()
    # Same bytes, but the first time in another segment, or with the opening token or padding inside.
    tokens, segments = row("^abcdefg9..^abcdefg9", "1" * 11 + "2" * 9)
    assert not recall_slice(tokens, segments, table).any()
    assert np.flatnonzero(recall_slice(tokens, None, table)[0]).tolist() == [18]
    tokens, _ = row("^abc^efg9..abc^efg9")
    assert not recall_slice(tokens, None, table).any()
    tokens, segments = row("abcdefg9abcdefg9", "1111111111111110")
    assert not recall_slice(tokens, segments, table).any()
    # Seven unknown bytes predict nothing: overlapping repeats count from the second full 8-gram on.
    tokens, _ = row("aaaaaaaaaa")
    assert np.flatnonzero(recall_slice(tokens, None, table)[0]).tolist() == [7, 8]


def test_recall_slice_against_searching():
    train = random_documents(3, letters=2)
    table = NgramTable.fit(train)
    random = np.random.default_rng(4)
    tokens = random.integers(97, 99, (4, 150))
    segments = np.sort(random.integers(1, 4, (4, 150)), axis=1)
    segments[:, 140:] = 0
    tokens[random.random(tokens.shape) < 0.01] = START
    expected = np.zeros(tokens.shape, bool)
    for b in range(4):
        for number in (1, 2, 3):
            places = np.flatnonzero(segments[b] == number)
            seen = set()
            for at in places[CONTEXT:]:
                gram = tuple(tokens[b, at - CONTEXT : at + 1].tolist())
                if START in gram:
                    continue
                context = int.from_bytes(bytes(gram[:-1]), "big")
                expected[b, at - 1] = gram in seen and table.predict(np.array([context], np.uint64))[0] != gram[-1]
                seen.add(gram)
    assert (recall_slice(tokens, segments, table) == expected).all() and expected.sum() >= 10


def test_recall_slice_edges():
    table = NgramTable.fit([])
    assert recall_slice(np.zeros((2, 7), int), None, table).shape == (2, 7)
    with pytest.raises(ValueError, match="segments"):
        recall_slice(np.zeros((2, 9), int), np.zeros((2, 8), int), table)
