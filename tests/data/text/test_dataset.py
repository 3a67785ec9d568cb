"""Text: every byte once an epoch, nothing crosses documents, held-out batches are fixed."""

import numpy as np
import pytest

from recollect.configuration import UserError, from_json, to_json
from recollect.data.text.dataset import Text
from recollect.data.text.rows import Chunked, Decomposed, Packed
from recollect.data.tokenizers import START, ByteTokenizer


def segments_of(batch):
    """Token lists of all segments of a batch."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            found.append(tokens[at].tolist())
    return found


def test_every_byte_of_every_document_once_an_epoch(folder):
    text = Text(source=str(folder), length=100)
    documents = text.prepared().train
    batches = text.batches(seed=0, batch_size=1)
    rows = batches.plan.counts[0]
    expected = []
    for number, size in enumerate(documents.lengths.tolist()):
        tokens = documents.tokens(number, 0, size)
        assert tokens[0] == START
        ended = [*tokens.tolist(), START]  # opens the next one, and so ends this one
        expected += [tuple(ended[at : at + 100]) for at in range(0, size + 1, 100)]
    for epoch in range(2):
        read = [batches.read(epoch * rows + row, 0, 1) for row in range(rows)]
        assert sorted(tuple(piece) for batch in read for piece in segments_of(batch)) == sorted(expected)


def test_rows_are_full_and_targets_stay_in_their_document(folder):
    text = Text(source=str(folder), length=128)
    batches = text.batches(seed=3, batch_size=32)
    assert batches.plan.facts()["fill"] > 0.95
    batch = batches.read(0, 0, 32)
    assert {a.dtype.name for a in (batch.tokens, batch.targets, batch.segments)} == {
        "int32"
    } and batch.weights.dtype == np.float32
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == batch.segments.shape == (32, 128)
    assert batch.target_positions is None and (batch.segments.max(axis=1) > 1).any()
    documents = text.prepared().train
    texts = [documents.tokens(number, 0, size).tobytes() for number, size in enumerate(documents.lengths.tolist())]
    beyond = 0
    for row in range(32):
        for number in range(1, batch.segments[row].max() + 1):
            at = np.flatnonzero(batch.segments[row] == number)
            labelled = batch.weights[row, at] > 0
            assert labelled[:-1].all() and (batch.targets[row, at[:-1]] == batch.tokens[row, at[1:]]).all()
            if labelled[-1]:  # the document goes on in another row
                piece = np.append(batch.tokens[row, at], batch.targets[row, at[-1]])
                assert any(piece.tobytes() in text for text in texts)
                beyond += 1
    assert beyond


@pytest.mark.parametrize("sequences", [Chunked(), Decomposed(shortest=16)])
def test_held_out_rows_do_not_depend_on_how_training_rows_are_made(folder, sequences):
    one, two = (Text(source=str(folder), length=64, sequences=way) for way in (Packed(), sequences))
    for left, right in zip(one.evaluation_batches(4), two.evaluation_batches(4), strict=True):
        assert (left.tokens == right.tokens).all() and (left.targets == right.targets).all()
    assert two.batches(0, 4).read(0, 0, 4).tokens.size <= 4 * 64


def test_held_out_batches_are_fixed_and_disjoint_from_training(folder):
    text = Text(source=str(folder), length=64, held_out_bytes=None)
    small = list(text.evaluation_batches(1))
    size = next(size for size in range(5, 100) if len(small) % size)
    large = list(text.evaluation_batches(size))
    order = [
        [tokens.tobytes() for batch in batches for tokens in batch.tokens if tokens.any()] for batches in (small, large)
    ]
    assert order[0] == order[1]  # whatever the batch size
    assert all(batch.tokens.shape == (size, 64) for batch in large)
    tail = large[-1].segments.max(axis=1) == 0
    assert tail.any() and (large[-1].weights[tail] == 0).all()  # `size` doesn't divide the number of rows
    prepared = text.prepared()
    assert sum((batch.segments != 0).sum() for batch in large) == prepared.held_out.lengths.sum()
    # Every byte is a target, those whose context lies in the row before among them.
    assert sum(batch.weights.sum() for batch in large) == prepared.held_out.byte_lengths.sum()
    sizes = prepared.train.lengths.tolist()
    train = b"\0".join(
        prepared.tokenizer.to_bytes(prepared.train.tokens(number, 0, size)) for number, size in enumerate(sizes)
    )
    held_out = [
        bytes(piece[1:]) for batch in large for piece in segments_of(batch) if len(piece) > 12 and piece[0] == START
    ]
    assert held_out and not any(piece in train for piece in held_out)
    limited = list(Text(source=str(folder), length=64, held_out_bytes=100).evaluation_batches(3))
    assert len(limited) == 1 and sum(batch.weights.sum() for batch in limited) == 100


def test_prompts_and_decoding(folder):
    text = Text(source=str(folder))
    prompt = text.prompt(seed=1, length=10)
    assert prompt[0] == START and len(prompt) <= 10
    held_out = text.prepared().held_out
    number = 1 % len(held_out)
    assert held_out.tokens(number, 0, int(held_out.lengths[number])).tolist()[: len(prompt)] == prompt
    assert text.decode(np.array([[START, 104, 105, START, 120]])) == "hi"
    assert text.vocabulary == 257 and text.longest == 512


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("naïve ☃")
    assert tokens[0] == START and tokenizer.decode(tokens) == "naïve ☃"
    assert tokenizer.decode(tokens[:4]) == "na�"  # cut within a character


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 1}, "length=1"),
        ({"source": "tfds:"}, "source="),
        ({"held_out_bytes": 0}, "=0"),
        ({"length": 100, "sequences": Decomposed(shortest=16)}, "length=100"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        Text(**fields)
    for text in (Text(length=32), Text(length=32, sequences=Decomposed(shortest=8, curriculum="grow_linear"))):
        assert from_json(to_json(text)) == text
