"""Ends of documents are trained on and not evaluated; bytes of targets are those of the text; prompts keep their
space."""

import math

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.data.text.dataset import Text
from recollect.data.text.ended_documents import EndedDocuments
from recollect.data.text.preparation.prepare import Preparation
from recollect.data.text.rows import Chunked, Decomposed, Packed, read_rows
from recollect.data.tokenizers import START
from recollect.evaluation.text_slices import evaluate_text
from tests.data.text.documents import CountedDocuments
from tests.data.text.preparation.prepared_folders import prepare_command, refused, write_lines
from tests.data.tokenizers.kinds_of_tokenizers import WORDS, save


def test_an_ended_document_has_one_token_more():
    documents = EndedDocuments(CountedDocuments([3, 1]), 7)
    assert documents.lengths.tolist() == [4, 2]
    assert documents.tokens(0, 0, 9).tolist() == [0, 1, 2, 7] and documents.tokens(1, 0, 2).tolist() == [1000, 7]
    assert documents.tokens(0, 1, 3).tolist() == [1, 2] and documents.tokens(0, 3, 4).tolist() == [7]
    assert documents.tokens(0, 2, 2).tolist() == []


@pytest.mark.parametrize(
    "sequences", [Packed(), Chunked(), Chunked(document_mask=False), Decomposed(shortest=2)], ids=repr
)
def test_every_document_s_end_is_a_target_once_an_epoch(tmp_path, sequences):
    root = tmp_path / "in"
    write_lines(root / "a.jsonl", *("x" * (number % 21 + 1) for number in range(60)))
    data = Text(source=str(root), length=16, sequences=sequences)
    documents = len(data.prepared().train)
    batches = data.batches(0, 1)
    ends, targets = 0, 0
    epoch = [(group, row) for group, count in enumerate(batches.plan.counts) for row in range(count)]
    for group, row in epoch:
        spans = [batches.plan.spans(group, row)]
        rows = read_rows(batches.documents, spans, 1, batches.plan.lengths[group])
        labelled = rows.weights[0] > 0
        ends += int((rows.targets[0][labelled] == START).sum())
        targets += int(labelled.sum())
    if isinstance(sequences, Decomposed):  # drops rests of documents
        assert ends > documents / 4
    else:
        assert ends == documents and targets == data.prepared().train.byte_lengths.sum() + documents
    # Held-out text is measured without: an end is no byte.
    assert not any((batch.targets[batch.weights > 0] == START).any() for batch in data.evaluation_batches(4))


@pytest.mark.parametrize("kind", ["word_piece", "metaspace", "metaspace_without_piece", "unigram"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_bits_per_byte_are_of_the_bytes_of_the_text(tmp_path, kind, batch_size):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS.split(), int(random.integers(1, 40)))) for _ in range(90)]
    source = write_lines(tmp_path / "in" / "a.jsonl", *texts, "held out é ☃")
    Preparation(str(source), str(save(kind, tmp_path)), unknown=0.5).into(tmp_path / "out", log=lambda line: None)
    data = Text(source=str(tmp_path / "out"), length=16, held_out_bytes=None)
    held_out = data.prepared().held_out
    size, targets = int(held_out.byte_lengths.sum()), int(held_out.lengths.sum()) - len(held_out)
    found = evaluate_text(lambda batch: np.ones(batch.targets.shape), data, batch_size, final=True)
    assert found["bytes"] == size and found["targets"] == targets
    unknown = sum(
        int(sizes[(batch.targets == data.open_tokenizer().unknown) & (batch.weights > 0)].sum())
        for batch, sizes, _ in data.measured_batches(1)
    )
    assert found["bits_per_byte"] == pytest.approx((targets / math.log(2) + 8 * unknown) / size)
    assert found["loss"] == pytest.approx(1)
    for batch, sizes, _ in data.measured_batches(batch_size):
        assert sizes.shape == batch.targets.shape and not sizes[batch.weights == 0].any()
    document = int(np.argmax(held_out.lengths))
    whole = held_out.token_bytes(document, 0, int(held_out.lengths[document]))
    assert whole[0] == 0 and whole.sum() == held_out.byte_lengths[document]
    assert held_out.token_bytes(document, 2, 5).tolist() == whole[2:5].tolist()


def test_a_tokenizer_that_does_not_know_the_text_is_refused(tmp_path, capsys):
    texts = [f"Все счастливые семьи похожи друг на друга {', и'} " * 3 for number in range(12)]
    known = [f"the cat sat {number % 7 * 'a'}" for number in range(9)]
    source = write_lines(tmp_path / "in" / "a.jsonl", *texts, *known)
    path = save("word_piece", tmp_path)
    line = refused(capsys, source, tmp_path / "out", "--tokenizer", path)
    assert "does not know 8" in line or "does not know 9" in line
    assert "% of the train text (" in line and "allow it with --unknown" in line
    with pytest.raises(UserError, match="does not know"):
        Text(source=str(source), tokenizer=str(path)).prepared()
    allowed = ("--tokenizer", path, "--unknown", "1", "--held-out", "0.5")
    code, shown, _ = prepare_command(capsys, source, tmp_path / "half", *allowed)
    assert code == 0 and "unknown to the tokenizer: " in shown and "% of the held_out text" in shown
    data = Text(source=str(tmp_path / "half"), length=64, held_out_bytes=None)
    assert data.result_entries()["corpus"]["held_out"]["unknown_bytes"] > 0
    # A model that is sure of <unk> does not beat one that has to spell the text.
    assert 4 < evaluate_text(lambda batch: np.zeros(batch.targets.shape), data, 4, final=False)["bits_per_byte"] < 8
    write_lines(tmp_path / "in" / "a.jsonl", *(f"the cat sat on a mat {number * 'a'}" for number in range(99)), "☃")
    code, shown, _ = prepare_command(capsys, source, tmp_path / "few", "--tokenizer", path)
    assert code == 0 and "unknown to the tokenizer: 0.0" in shown  # few are reported


@pytest.mark.parametrize("kind", ["word_piece", "metaspace", "unigram"])
def test_a_continuation_keeps_the_space_after_the_prompt(tmp_path, kind):
    source = write_lines(tmp_path / "in" / "a.jsonl", *(f"{WORDS} {number * 'a'}" for number in range(9)))
    path = save(kind, tmp_path)
    data = Text(source=str(source), tokenizer=str(path))
    prompt = data.encode("hello")
    following = data.encode("hello world again")[len(prompt) :]
    assert data.encode("hello world again")[: len(prompt)] == prompt
    assert data.continued("hello", following) == "hello world again"
    assert data.continuation(prompt, following) == " world again"
    # A prompt stays as it was typed, and gets no second space.
    spaced = data.encode("hello ")
    after = data.encode("hello world")[len(prompt) :] if kind == "word_piece" else data.encode("world")[2:]
    shown = data.continued("hello ", after)
    assert shown.startswith("hello ") and "  " not in shown, spaced
    if kind == "word_piece":
        assert data.continued("HELLO  there", following) == "HELLO  there world again"
    ended = [*following[:-1], prompt[0], *following]
    shown = data.continued("hello", ended)
    assert shown.startswith("hello world") and shown.count("world") == 1


def test_a_continuation_of_bytes_ends_where_another_document_begins():
    data = Text()
    assert data.continued("naï", [*"ve ☃".encode(), START, 120]) == "naïve ☃"
    assert data.continuation([START, 0xC3], [0xAF, 120]) in ("x", "�x")  # a character cut in two
