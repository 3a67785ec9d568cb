"""The pretraining benchmark at a tiny size: a real run of it, what it hands to its peer, and what it says when it
cannot."""

import json
import os
import stat

import chz
import pytest

from recollect.benchmarks import pretraining
from recollect.configuration import UserError
from recollect.data.text.dataset import Text
from recollect.experiments.pretrain import variant
from recollect.layers import Attention, Hyena
from recollect.models import repeat
from recollect.training.experiment import Run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for index in range(20):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"text number {index}, " * 20)
    published = variant("attention_30m")
    return chz.replace(
        published,
        model=chz.replace(published.model, width=16, stages=repeat(Attention(heads=2), depth=2)),
        data=Text(source=str(tmp_path / "texts"), length=32),
        run=Run(steps=10, batch_size=4, accumulate=2, precision="default"),
    )


def test_a_whole_run(tiny, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("recollect.experiments.registry.load", lambda name, kind: asked.append(name) or tiny)
    interpreter = tmp_path / "python"
    answer = {
        "tokens_per_second": 100.0,
        "step_seconds": 1.28,
        "seconds": [1.28],
        "parameters": 7,
        "version": "fla 1, torch 2",
    }
    interpreter.write_text(
        f"#!/bin/sh\nhead -n 1 > {tmp_path}/case.json\necho noise\necho 'RESULT {json.dumps(answer)}'\n"
    )
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    out = ["--out", str(tmp_path / "results"), "--peer-python", str(interpreter)]
    assert pretraining.main(["--models", "attention_30m", "optimizer.learning_rate=1e-4", "--steps", "2", *out]) == 0
    assert asked == ["pretrain.attention_30m"]
    result = json.loads(next((tmp_path / "results").glob("cpu-*/pretraining.json")).read_text())
    (row,) = result["rows"]
    assert len(row["seconds"]) == 2 and row["tokens_per_second"] == pytest.approx(4 * 32 / row["step_seconds"])
    assert 0 <= row["waiting_for_data"] < 1 and "mfu" not in row and row["vocabulary"] == 257
    assert row["peer"] == answer
    case = json.loads((tmp_path / "case.json").read_text())
    assert case["layers"] == 2 * [{"kind": "attention", "heads": 2}]
    assert (case["rows"], case["pieces"], case["length"], case["steps"], case["optimizer"]["learning_rate"]) == (
        4,
        2,
        32,
        2,
        1e-4,
    )
    said = capsys.readouterr().out
    assert "pretrain.attention_30m" in said and "times as fast" in said


def test_the_peers_case_of_published_based():
    case = pretraining.peer_case(variant("based_360m"))
    kinds = [layer["kind"] for layer in case["layers"]]
    assert len(kinds) == 27 and (kinds.count("taylor"), kinds.count("window"), kinds.count("convolution")) == (5, 5, 17)
    assert case["layers"][1] == {"kind": "taylor", "heads": 16, "feature_dim": 16}
    assert case["layers"][2] == {"kind": "window", "heads": 16, "window": 129, "rotary": 1.0}
    assert case["hidden"] == 2048 and case["length"] == 2048


def test_what_the_peer_cannot_do(tiny, tmp_path):
    model = chz.replace(tiny.model, stages=repeat(Hyena(maximum_length=32), depth=1))
    with pytest.raises(UserError, match="the peer has no Hyena"):
        pretraining.peer_case(chz.replace(tiny, model=model))
    with pytest.raises(UserError, match="cannot be run"):
        pretraining.peer(tiny, str(tmp_path / "none"), 1, {})
    broken = pretraining.peer(tiny, "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false", 1, {})
    assert broken["error"] == "the process ended: exit code 1"


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--unknown"], ["--models", "attention_31m"], ["attention_30m"]]
)
def test_wrong_options(arguments):
    with pytest.raises(UserError):
        pretraining.main(arguments)


def test_defaults_are_experiments():
    from recollect.experiments.registry import entries

    for name in (*pretraining.ON_CPU, *pretraining.ON_ACCELERATORS):
        assert f"pretrain.{name}" in entries()


def test_the_step_is_compiled_before_its_turn_and_not_again(tiny, monkeypatch):
    traced, turns = [], []
    step = pretraining.Program.step
    monkeypatch.setattr(pretraining.Program, "step", lambda self, *rest: (traced.append(1), step(self, *rest))[1])
    row = pretraining.measure(tiny, 1, lambda: turns.append(len(traced)))
    assert turns == [1] and len(traced) == 1 and row["tokens_per_second"] > 0
