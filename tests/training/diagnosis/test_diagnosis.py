"""What `recollect diagnose` says, of a tiny run and of numbers made up for the purpose."""

import dataclasses
import json
import re
import shlex

import jax
import numpy as np
import pytest

from recollect.data.batch import Batch
from recollect.main import main
from recollect.models.functional import flatten
from recollect.training.diagnosis import advise, look_into
from recollect.training.diagnosis.look import distances
from recollect.training.step import program_for

SMALL = [
    *("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=16", "run.batch_size=8"),
    *("run.steps=8", "run.steps_per_call=2", "run.log_every=2", "run.evaluate_every=8", "run.checkpoint_every=8"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    argv = ["train", "mqar.window", *SMALL, f"run.directory={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["recollect", *argv])  # what environment.json keeps
        assert main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def seen(run):
    return look_into(run)


def test_distances_lead_to_the_last_place_of_the_answer():
    tokens = np.array([[5, 9, 6, 9, 5, 1]])
    batch = Batch(tokens, np.array([[9, 9, 7, 6]]), np.array([[4, 0, 5, 2]]), np.ones((1, 4)))
    assert distances(batch).tolist() == [[2, 0, 0, 1]]
    everywhere = Batch(tokens, np.array([[9, 5, 9, 9, 5, 2]]), None, np.ones((1, 6)))
    assert distances(everywhere).tolist() == [[0, 2, 2, 1, 1, 0]]


def test_parts_hold_all_parameters_and_gradients(run, seen):
    from recollect.training.checkpoint.load import open_run

    saved = open_run(run)
    total = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in flatten(saved.params).values()))
    assert np.sqrt(sum(part.parameter**2 for part in seen.parts)) == pytest.approx(total, rel=1e-5)
    program = program_for(saved.experiment)
    batch = saved.experiment.data.evaluation_batch(saved.experiment.run.seed, 0, None, 64)
    gradients, metrics = jax.jit(lambda params: program.gradients(params, batch, None))(saved.params)
    norm = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in flatten(gradients).values()))
    assert np.sqrt(sum(part.gradient**2 for part in seen.parts)) == pytest.approx(norm, rel=1e-3)
    assert seen.loss == pytest.approx(float(metrics["loss"]), rel=1e-4)
    assert [part.name for part in seen.parts] == [
        *("embedding", "layer 0 BaseConvolution mixer", "layer 1 SlidingWindow mixer", "final norm")
    ]
    assert all(part.activation > 0 and part.gradient > 0 for part in seen.parts)


def test_answers_by_distance_are_all_answers(seen):
    right, count = np.sum(list(seen.correct_by_distance.values()), axis=0)
    assert count == 128 and right / count == pytest.approx(seen.accuracy)
    assert len(seen.examples) == 4 and all(example.distance for example in seen.examples)


def test_the_command_prints_what_to_try_and_its_lines_run(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    capsys.readouterr()
    assert main(["diagnose", str(run)]) == 0
    out = capsys.readouterr().out
    assert "right, by how many tokens back" in out and "-> " in out and "gradient (norm)" in out
    commands = re.findall(r"^    recollect (.*)$", out, re.M)
    rates = [command for command in commands if "optimizer.learning_rate=" in command]
    assert len(rates) == 3 and any(".heads=2" in command for command in commands)
    heads = next(command for command in commands if ".heads=2" in command)
    assert main(shlex.split(heads)) == 0
    config = json.loads((run.parent / "run-heads=2" / "config.json").read_text())
    before = json.loads((run / "config.json").read_text())
    assert config["model"]["stages"][0]["pattern"][1]["heads"] == 2 and config["data"] == before["data"]


def folder_with(tmp_path, losses, **result):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1))
    )
    (tmp_path / "result.json").write_text(json.dumps({"chance": 1 / 16, **result}))
    return tmp_path


def whys(path, seen):
    return [piece.why for piece in advise(path, seen, ["train", "mqar.window"])]


def test_advice_follows_from_the_numbers(tmp_path, seen):
    flat, falling = [3.4] * 40, list(np.linspace(3.4, 1.0, 40))
    stuck = dataclasses.replace(seen, accuracy=0.05, correct_by_distance={8: (1, 64), 16: (2, 64)})
    first, *others = whys(folder_with(tmp_path, flat), stuck)
    assert "learning rate of 0.003" in first and any("one head" in why for why in others)
    assert not any("longer" in why or "window" in why for why in [first, *others])
    better = dataclasses.replace(seen, accuracy=0.6, correct_by_distance={8: (60, 64), 32: (10, 64)})
    first, *others = whys(folder_with(tmp_path, falling), better)
    assert "train longer" in first and any("a window sees 17" in why for why in others)
    assert whys(tmp_path, dataclasses.replace(seen, accuracy=0.99)) == []
    failure = {"step": 4, "found": "first broken activations: layer 1", "folder": "a b/failures/4"}
    (only,) = advise(folder_with(tmp_path, flat, failure=failure), stuck, ["train", "mqar.window"])
    assert "layer 1" in only.why and only.commands[0] == "recollect replay 'a b/failures/4'"
    assert "optimizer.clip=1" in only.commands[1] and "optimizer.learning_rate=0.0003" in only.commands[1]


def test_a_study_member_is_trained_anew_with_its_own_config(run, monkeypatch, capsys):
    environment = json.loads((run / "environment.json").read_text())
    monkeypatch.setattr("recollect.configuration.read_json.read_json", read_without_command(environment))
    assert main(["diagnose", str(run)]) == 0
    out = capsys.readouterr().out
    assert "train mqar.window data." in out and "data.vocab_size=32 data.length=16 data.pairs=2" in out


def read_without_command(environment):
    """`read_json` as if the run had been started by `compare`."""
    from recollect.configuration.read_json import read_json

    def read(path):
        data = read_json(path)
        return {**data, "command": ["main.py", "compare", "x"]} if data == environment else data

    return read
