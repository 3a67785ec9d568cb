"""Text: every byte once an epoch, nothing crosses documents, iterators continue exactly, held-out batches are fixed."""

import json

import numpy as np
import pytest

from configuration import UserError, from_json, to_json
from data.packing import cut, next_token_targets, pack
from data.text import Text
from data.tokenizers import START, ByteTokenizer


def segments_of(batch):
    """Token lists of all segments of a batch."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            found.append(tokens[at].tolist())
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_byte_of_every_document_once_an_epoch(folder, shuffle):
    text = Text(source=str(folder), length=100, shuffle=shuffle)
    documents = list(text.corpus().train)
    rows = len(text.train_rows())
    iterator = text.train_iterator(seed=0, batch_size=1)
    orders = []
    for _ in range(2):
        batches = [next(iterator) for _ in range(rows)]
        orders.append([batch.tokens.tobytes() for batch in batches])
        pieces = sorted(tuple(piece) for batch in batches for piece in segments_of(batch))
        expected = []
        for document in documents:
            tokens = [START, *document]
            expected += [tuple(tokens[at : at + 100]) for at in range(0, len(tokens), 100)]
        assert pieces == sorted(expected)
    assert (orders[0] == orders[1]) != shuffle and sorted(orders[0]) == sorted(orders[1])


def test_rows_are_full_and_targets_stay_in_their_segment(folder):
    text = Text(source=str(folder), length=128)
    assert text.train_rows().fill > 0.95
    batch = next(text.train_iterator(seed=3, batch_size=32))
    assert {a.dtype.name for a in (batch.tokens, batch.targets, batch.segments)} == {"int32"} and batch.weights.dtype == np.float32
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == batch.segments.shape == (32, 128)
    assert batch.target_positions is None and (batch.segments.max(axis=1) > 1).any()
    for row in range(32):
        for at in range(128):
            last = at == 127 or batch.segments[row, at + 1] != batch.segments[row, at]
            labelled = batch.segments[row, at] != 0 and not last
            assert batch.weights[row, at] == labelled
            assert batch.targets[row, at] == (batch.tokens[row, at + 1] if labelled else 0)


def test_padding_is_segment_zero_without_weight():
    tokens = np.array([[START, 5, 6, START, 7, 0]])
    targets, weights = next_token_targets(tokens, np.array([[1, 1, 1, 2, 2, 0]]))
    assert targets.tolist() == [[5, 6, 0, 7, 0, 0]] and weights.tolist() == [[1, 1, 0, 1, 0, 0]]


def test_packing_takes_each_piece_once_and_fills_rows():
    random = np.random.default_rng(1)
    pieces = cut(random.integers(1, 1000, 500), 64)
    sizes = pieces.stop - pieces.start
    rows = pack(sizes, 64)
    assert sorted(rows.order.tolist()) == list(range(len(sizes)))
    loads = [sizes[rows.pieces(row)].sum() for row in range(len(rows))]
    assert max(loads) <= 64 and sum(loads) / (64 * len(rows)) > 0.99
    assert pack(np.array([3, 3, 3, 5]), 8).order.tolist() == [3, 0, 1, 2]
    assert len(pack(np.zeros(0, int), 8)) == 0
    with pytest.raises(ValueError, match="sizes"):
        pack(np.array([9]), 8)
    with pytest.raises(ValueError, match="length=0"):
        cut(np.array([9]), 0)


@pytest.mark.parametrize("used_before", [False, True])
def test_an_iterator_continues_from_its_state(folder, used_before):
    text = Text(source=str(folder), length=64)
    iterator = text.train_iterator(seed=5, batch_size=7)
    for _ in range(45):  # more than an epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = [next(iterator) for _ in range(60)]
    restored = text.train_iterator(seed=5, batch_size=7)
    if used_before:
        next(restored)
    restored.set_state(state)
    for left in ahead:
        right = next(restored)
        assert (left.tokens == right.tokens).all() and (left.segments == right.segments).all()
    with pytest.raises(UserError, match="was trained on corpus 000000000000"):
        restored.set_state({**state, "corpus": "0" * 64})


def test_order_is_a_function_of_the_seed(folder):
    text = Text(source=str(folder), length=64)
    first, again, other = (next(text.train_iterator(seed, 16)).tokens for seed in (0, 0, 1))
    assert (first == again).all() and not (first == other).all()


def test_held_out_batches_are_fixed_and_disjoint_from_training(folder):
    text = Text(source=str(folder), length=64)
    small = list(text.evaluation_batches(1, 1000))
    size = next(size for size in range(5, 100) if len(small) % size)
    large = list(text.evaluation_batches(size, 1000))
    order = [[tokens.tobytes() for batch in batches for tokens in batch.tokens if tokens.any()] for batches in (small, large)]
    assert order[0] == order[1]  # whatever the batch size
    assert all(batch.tokens.shape == (size, 64) for batch in large)
    tail = large[-1].segments.max(axis=1) == 0
    assert tail.any() and (large[-1].weights[tail] == 0).all()  # `size` doesn't divide the number of rows
    count = sum(len(document) + 1 for document in text.corpus().held_out)
    assert sum((batch.segments != 0).sum() for batch in large) == count
    train = b"\0".join(text.corpus().train)
    held_out = [bytes(piece[1:]) for batch in large for piece in segments_of(batch) if len(piece) > 12 and piece[0] == START]
    assert held_out and not any(piece in train for piece in held_out)
    assert len(list(text.evaluation_batches(3, 2))) == 2
    assert len(list(Text(source=str(folder), length=64, held_out_batches=1).evaluation_batches(3))) == 1


def test_prompts_and_decoding(folder):
    text = Text(source=str(folder))
    prompt = text.prompt(seed=1, length=10)
    assert prompt[0] == START and len(prompt) <= 10
    assert text.corpus().held_out[1 % len(text.corpus().held_out)].startswith(text.decode(prompt).encode())
    assert text.decode(np.array([[START, 104, 105, START, 120]])) == "hi"
    assert text.vocabulary == 257 and text.longest == 512


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("naïve ☃")
    assert tokens[0] == START and tokenizer.decode(tokens) == "naïve ☃"
    assert tokenizer.decode(tokens[:4]) == "na�"  # cut within a character
    for start in range(4):
        for stop in range(start, 6):
            assert tokenizer.encode("naïve ☃", start, stop).tolist() == tokens[start:stop].tolist()


@pytest.mark.parametrize(
    ("fields", "message"), [({"length": 1}, "length=1"), ({"source": "tfds:"}, "source="), ({"held_out_batches": 0}, "=0")]
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        Text(**fields)
    assert from_json(to_json(Text(length=32))) == Text(length=32)
