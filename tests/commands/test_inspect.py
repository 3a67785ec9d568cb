"""`recollect inspect` of prepared text, token ids, experiments, runs and tasks, through the command line."""

import re

import numpy as np
import pytest

from recollect.configuration import python_files
from recollect.data.batch import Batch
from recollect.data.inspection import example, spread
from recollect.main import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(f"text {number} " * (number + 1))


def inspected(capsys, *arguments):
    capsys.readouterr()
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_prepared_text_shows_splits_lengths_unknown_bytes_and_documents(capsys):
    assert main(["prepare", "texts", "out", "--held-out", "0.2"]) == 0
    out = inspected(capsys, "out", "--count", "1")
    assert re.search(
        r"^out: tokenizer bytes, 257 ids; corpus sha256 [0-9a-f]{16}; rows of 512 tokens, Packed$", out, re.M
    )
    counts = [int(number) for number in re.findall(r"^(?:train|held out): (\d+) documents", out, re.M)]
    assert sum(counts) == 30 and min(counts) >= 1 and out.count("0.000% of them unknown") == 2
    assert "1 (8 tokens): 'text 0 '" in out and "  2 (" not in out
    assert re.search(r"tokens per document: min 8, median \d+, max \d+  \|[▁-█ ]+\|", out)


def test_text_and_token_ids_are_named_by_their_paths(capsys):
    assert "texts: tokenizer bytes" in inspected(capsys, "texts", "length=64")
    np.arange(100, dtype=np.uint16).tofile("ids.bin")
    out = inspected(capsys, "ids.bin", "data.end_token=49")
    assert "ids.bin: tokenizer ids, 100 ids" in out and "train: 2 documents, 95 tokens\n" in out
    assert "1 (50 tokens): '0 1 2 3" in out and "bytes" not in out


def test_a_task_shows_examples_with_their_labels(capsys):
    small = ["vocab_size=32", "length=16", "pairs=2"]
    out = inspected(capsys, "MQAR", *small, "--count", "3")
    assert "MQAR: 32 ids, accuracy of a guess 6.25%" in out and "labels per example: 2 each" in out
    rows = re.findall(r"^  \d: (.*)$", out, re.M)
    assert len(rows) == 6
    for row in rows:
        tokens = [re.fullmatch(r"(\d+)(?:\[->(\d+)\])?", word).groups() for word in row.split()]
        pairs = {tokens[0][0]: tokens[1][0], tokens[2][0]: tokens[3][0]}
        assert len(tokens) == 16 and {key: answer for key, answer in tokens if answer} == pairs
    assert inspected(capsys, "mqar.attention", *(f"data.{one}" for one in small), "--count", "3") == out


def test_a_runs_data_are_those_of_its_config(capsys):
    tiny = ("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=8", "model.width=8")
    run = ("run.steps=1", "run.batch_size=4", "run.steps_per_call=1", "run.directory=run", "run.compile_cache=off")
    assert main(["train", "mqar.attention", *tiny, *run]) == 0
    assert "evaluation 16x2: 8 examples" in inspected(capsys, "run", "--count", "0")


def test_a_file_of_the_users_is_run_once(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("print('running')")
    small = ["data.vocab_size=32", "data.length=16", "data.pairs=2"]
    assert inspected(capsys, "mqar.attention", *small, "--count", "1", "--with", "mine.py").count("running") == 1
    python_files.forget()


def test_padding_and_unlabelled_positions_have_no_answer():
    batch = Batch(np.array([[1, 2, 3]]), np.array([[2, 3, 0]]), None, np.array([[1.0, 0.0, 0.0]]))
    assert example(batch, 0) == "1[->2] 2 3"


def test_spread_is_a_line_with_as_many_numbers_as_there_are():
    assert spread([7, 7]) == "7 each"
    assert spread([1, 2, 2, 3]) == "min 1, median 2, max 3  |▄█▄|"
    assert spread([1] * 10 + [10_000]).endswith("▁| (powers)")
