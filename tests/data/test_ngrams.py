"""Bigram bits and the 7-byte table against counting by hand, and the recall slice on made-up rows."""

import collections
import math

import numpy as np
import pytest

from data.ngrams import CONTEXT, Bigram, NgramTable, recall_slice
from data.tokenizers import START


def random_documents(seed, count=12, letters=3):
    random = np.random.default_rng(seed)
    return [random.integers(97, 97 + letters, int(random.integers(0, 200)), np.uint8).tobytes() for _ in range(count)]


def test_bigram_bits_against_counting():
    train, held_out = random_documents(0), random_documents(1)
    counts = collections.Counter(pair for document in train for pair in zip([START, *document], document))  # noqa: B905 (one shorter)
    before = collections.Counter()
    for (left, _), count in counts.items():
        before[left] += count
    bits = [
        -math.log2((counts[pair] + 1) / (before[pair[0]] + 256))
        for document in held_out
        for pair in zip([START, *document], document)  # noqa: B905
    ]
    model = Bigram.fit(train)
    assert model.bits_per_byte(held_out) == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    assert np.exp(model.log_probability).sum(axis=1) == pytest.approx(np.ones(257))
    tokens = np.array([[START, *held_out[1][:20]]])
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).shape == (1, 20)


def test_table_against_counting():
    documents = random_documents(2, count=30, letters=2)
    successors = collections.defaultdict(collections.Counter)
    for document in documents:
        for at in range(len(document) - CONTEXT):
            successors[document[at : at + CONTEXT]][document[at + CONTEXT]] += 1
    table = NgramTable.fit(documents)
    assert len(table.contexts) == len(successors) > 100
    contexts = np.array([int.from_bytes(context, "big") for context in successors], np.uint64)
    expected = [min(counter, key=lambda byte: (-counter[byte], byte)) for counter in successors.values()]
    assert table.predict(contexts).tolist() == expected
    assert table.predict(np.array([5], np.uint64)).tolist() == [-1]


def test_top_bytes_do_not_overflow():
    table = NgramTable.fit([b"\xff" * 7 + b"\xfe"])
    assert table.predict(np.array([2**56 - 1], np.uint64)).tolist() == [0xFE]
    assert NgramTable.fit([b"short"]).predict(np.array([0], np.uint64)).tolist() == [-1]


def row(text, segments=None):
    tokens = np.array([[START if char == "^" else ord(char) for char in text]])
    return tokens, None if segments is None else np.array([[int(char) for char in segments]])


def test_recall_slice_by_hand():
    table = NgramTable.fit([b"xxabcdefgZ", b"--1234567!"])
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
