"""Studies of lengths and of caches measure what they say, go on where they stopped, and draw it."""

import csv

import chz
import jax
import pytest

from recollect.configuration import UserError
from recollect.configuration.console import exit_code
from recollect.experiments import cache_frontier, lengths
from recollect.experiments.measurements import Measurements
from recollect.layers import Attention, BaseConvolution
from recollect.models import repeat
from recollect.training.checkpoint.load import SavedRun
from recollect.training.checkpoint.saved_data import SavedData
from recollect.training.step import program_for
from recollect.training.train import train
from tests.training.tiny import tiny

LENGTH = 150


def test_a_reader_is_measured_at_a_length():
    experiment = lengths.attention()
    experiment = chz.replace(experiment, model=chz.replace(experiment.model, width=16))
    params = program_for(experiment).model.init(jax.random.key(0))
    run = SavedRun(experiment, params, 0, experiment.data.vocabulary, SavedData(None, None, "", None, None))
    row = lengths.measure(run, lengths.Reader("model...cache=RecentTokens(budget=20)"), LENGTH, 8)
    assert row["keys_read"] == 20 and 0 <= row["accuracy"] <= 1
    assert set(row["accuracy_by_depth"]) <= {f"{10 * depth}%" for depth in range(10)}
    searched = lengths.measure(run, lengths.READERS["infini_retri"], LENGTH, 8)
    assert searched["keys_read"] > 2 * 128 / 6  # two question tokens of six read a window of 128 at least


def test_what_is_expected_of_lengths_is_checked():
    def row(reader, accuracy, far):
        by_depth = {f"{10 * depth}%": far if depth < 4 else 1.0 for depth in range(10)}
        return {"reader": reader, "length": 512, "accuracy": accuracy, "accuracy_by_depth": by_depth}

    rows = [row("full", 0.95, 1.0), row("window", 0.5, 0.1), row("hip", 0.86, 0.8), row("landmark", 0.84, 0.8)]
    assert [holds for holds, _ in lengths.expected(rows)] == [True, True, True, False]
    assert [holds for holds, _ in lengths.expected([row("window", 0.5, 0.4)])] == [False]


def test_contexts_too_short_are_refused_before_training(tmp_path, capsys):
    assert exit_code(lambda: lengths.main([str(tmp_path / "out"), "--lengths", "8"])) == 2
    assert "length=8: the needles and questions need" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_are_measured_once(tmp_path):
    path = tmp_path / "deep" / "rows.json"
    first = Measurements(path).of({"name": "a"}, lambda: {"score": 1.0})
    assert Measurements(path).of({"name": "a"}, lambda: pytest.fail("measured twice")) == first
    assert Measurements(path).of({"name": "b"}, lambda: {"score": 2.0})["score"] == 2
    path.write_text("{}")
    with pytest.raises(UserError, match="no list of measurements"):
        Measurements(path)


def test_policies_stand_beside_mixers(tmp_path, monkeypatch):
    linear = tiny(tmp_path / "linear", steps=2)
    stages = repeat(BaseConvolution(kernel=3), Attention(), depth=2)
    softmax = chz.replace(tiny(tmp_path / "softmax", steps=2), model=chz.replace(linear.model, stages=stages))
    results = [train(chz.replace(one, name=name)) for name, one in (("t.linear", linear), ("t.softmax", softmax))]
    arguments = (tmp_path / "softmax", [str(tmp_path / "linear")], tmp_path / "out", 8, 50, ["RecentTokens(budget=4)"])
    rows = {row["name"]: row for row in cache_frontier.study(*arguments)}
    assert rows["RecentTokens"]["keys_read"] == 4 and rows["softmax"]["keys_read"] == 12.5
    assert rows["linear"]["keys_read"] == 0 and rows["linear"]["state_bytes"] == results[0]["state_bytes"]["16"]
    for name, result in zip(("linear", "softmax"), results, strict=True):
        assert rows[name]["accuracy"] == pytest.approx(result["accuracy"], abs=0.021)
    with (tmp_path / "out" / "frontier.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(rows)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    monkeypatch.setattr(cache_frontier, "measure", lambda *_: pytest.fail("measured twice"))
    assert len(cache_frontier.study(*arguments)) == 3
    with pytest.raises(UserError, match="no layer of Attention"):
        cache_frontier.study(tmp_path / "linear", *arguments[1:])
