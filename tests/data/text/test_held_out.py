"""The text that an evaluation measures: the same bytes for every tokenizer, row length and batch size."""

import json

import numpy as np
import pytest

from recollect.data.text import held_out
from recollect.data.text.dataset import Text
from recollect.data.text.held_out import HeldOutText, choose
from recollect.main import main

TINY = (
    *("data.length=32", "model.width=16", "model.stages.0.repeats=1", "...heads=2", "model.mlp=None"),
    *("run.steps=2", "run.batch_size=4", "run.sample_every=0", "run.steps_per_call=2", "run.compile_cache=off"),
)


@pytest.fixture
def words(tmp_path):
    """60 files of words, so that tokens have several bytes."""
    random = np.random.default_rng(0)
    choices = np.array(["attention", "recall", "state", "naïve", "kernel", "\n", "head"])
    (tmp_path / "words").mkdir()
    for index in range(60):
        (tmp_path / "words" / f"{index}.txt").write_text(" ".join(random.choice(choices, int(random.integers(5, 90)))))
    return tmp_path / "words"


class Sized:
    """Documents whose token t of document d has t % 3 bytes (the opening one none)."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, np.int64)
        sizes = [np.arange(length) % 3 for length in lengths]
        self.sizes = sizes
        self.byte_lengths = np.array([of.sum() for of in sizes])

    def tokens(self, document, start, stop):
        return np.arange(1000 * document + start, 1000 * document + min(stop, self.lengths[document]), dtype=np.int32)

    def token_bytes(self, document, start, stop):
        return self.sizes[document][start:stop]


def test_evaluate_measures_the_same_text_whatever_the_batch_size(words, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = [*TINY, f"data.source={words}", "data.held_out_bytes=300"]
    assert main(["train", "text.attention", *settings, f"run.directory={folder}"]) == 0
    trained = json.loads((folder / "result.json").read_text())
    assert trained["bytes"] == 300
    for size in (2, 16):
        capsys.readouterr()
        assert main(["evaluate", str(folder), f"run.batch_size={size}"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["bytes"] == 300 and metrics["targets"] == trained["targets"]
        assert metrics["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("limit", [1, 77, 300, None])
def test_tokenizers_are_measured_on_the_same_bytes(words, monkeypatch, limit):
    monkeypatch.setattr(held_out, "SHORTEST_PIECE", 50)
    measured = {}
    for tokenizer in ("bytes", "bpe:280", "bpe:320"):
        for length, rows in ((32, 4), (50, 3)):
            data = Text(source=str(words), tokenizer=tokenizer, length=length, held_out_bytes=limit)
            batches = list(data.measured_batches(rows))
            measured[tokenizer, length] = sum(float((batch.weights * sizes).sum()) for batch, sizes, _ in batches)
    total = int(data.prepared().held_out.byte_lengths.sum())
    expected = total if limit is None else min(limit, total)
    assert measured == {key: pytest.approx(expected, rel=1e-6) for key in measured}


@pytest.mark.parametrize("limit", [5, 40, 100, 119, None])
def test_every_byte_chosen_is_measured_once_and_no_other(monkeypatch, limit):
    monkeypatch.setattr(held_out, "SHORTEST_PIECE", 7)
    documents = Sized([1, 2, 30, 3, 61, 25])
    pieces = choose(documents.byte_lengths, limit)
    total = int(documents.byte_lengths.sum())
    assert sum(end - begin for _, begin, end in pieces) == min(limit or total, total)
    assert pieces == sorted(pieces) and (limit is None or limit >= total or len(pieces) > 1 or limit < 7)
    counted = {}
    for batch, sizes, numbers in HeldOutText(documents, limit).batches(length=8, batch_size=3):
        parts = (array.flat for array in (batch.targets, batch.weights, sizes, numbers))
        for target, weight, size, number in zip(*parts, strict=True):
            if weight:
                document, token = divmod(int(target), 1000)
                assert size == token % 3 and number == document
                counted[document, token] = counted.get((document, token), 0) + weight
    for document, of in enumerate(documents.sizes):
        ends = np.cumsum(of)
        for token in range(1, len(of)):
            inside = sum(
                max(0, min(end, ends[token]) - max(begin, ends[token - 1]))
                for number, begin, end in pieces
                if number == document
            )
            if of[token]:
                assert counted.get((document, token), 0) == pytest.approx(inside / of[token]), (document, token)
            elif limit is None:
                assert counted[document, token] == 1


def test_pieces_are_spread_over_a_text_and_a_longer_evaluation_is_not_another():
    sizes = np.array([10_000_000])
    pieces = choose(sizes, 1_000_000)
    assert len(pieces) > 50 and pieces[0][1] < 1_000_000 and pieces[-1][2] > 9_000_000
    short, longer = choose(np.full(500, 3000), 60_000), choose(np.full(500, 3000), 90_000)
    assert {document for document, _, _ in short} < {document for document, _, _ in longer}


def test_the_old_name_is_refused_with_the_remedy_and_saved_configs_load(capsys):
    from recollect.configuration import from_json, to_json

    for path in ("data.held_out_batches", "...held_out_batches"):
        assert main(["train", "text.attention", f"{path}=20"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and "data.held_out_bytes" in error
    old = to_json(Text(length=32))
    del old["held_out_bytes"]
    assert from_json({**old, "held_out_batches": 7}) == Text(length=32)
