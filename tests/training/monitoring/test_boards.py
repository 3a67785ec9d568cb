"""TensorBoard and Weights & Biases, offline, with the real libraries where they are installed."""

import importlib.util
import json
import sys

import pytest

from recollect.main import main
from recollect.training.monitoring.boards import numbers_of
from tests.training.tiny import tiny

SMALL = [
    *("data.vocab_size=32", "data.length=16", "data.pairs=2", "data.evaluation_examples=16", "run.batch_size=8"),
    *("run.steps=6", "run.steps_per_call=3", "run.log_every=3", "run.evaluate_every=3", "run.checkpoint_every=6"),
]


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is not installed here")


def test_numbers_have_names_and_the_learning_rate(tmp_path):
    numbers = numbers_of(tiny(tmp_path, steps=100))
    step = {"step": 1, "loss": 2.0, "throughput": {"tokens_per_second": 5.0}}
    rate = numbers(step).pop("learning_rate")
    assert numbers(step) == {"loss": 2.0, "throughput/tokens_per_second": 5.0, "learning_rate": rate}
    assert (
        0
        < numbers({**step, "step": 90})["learning_rate"]
        < rate
        == pytest.approx(tiny(tmp_path).optimizer.learning_rate)
    )
    evaluated = numbers(
        {"step": 1, "evaluation": {"accuracy": 0.5, "accuracy_by_slice": {"64x4": 0.25, "empty": None}}}
    )
    assert evaluated == {"evaluation/accuracy": 0.5, "evaluation/accuracy_by_slice/64x4": 0.25}


@pytest.mark.parametrize(
    ("field", "package"), [("run.tensorboard=True", "tensorboardX"), ("run.wandb=offline", "wandb")]
)
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, field, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "mqar.attention", *SMALL, field, f"run.directory={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and f"pip install 'recollect[{package.lower().removesuffix('x')}]'" in error


@needs("tensorboardX")
def test_tensorboard_gets_every_number(tmp_path):
    assert main(["train", "mqar.attention", *SMALL, "run.tensorboard=True", f"run.directory={tmp_path / 'run'}"]) == 0
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    for name in (b"learning_rate", b"evaluation/accuracy_by_slice/16x2", b"throughput/tokens_per_second", b"config"):
        assert name in events.read_bytes()


@needs("wandb")
def test_weights_and_biases_keeps_a_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    assert main(["train", "mqar.attention", *SMALL, "run.wandb=offline", f"run.directory={run}"]) == 0
    importlib.import_module("wandb").teardown()  # waits for the process that writes; a command's end does so too
    (kept,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    text = kept.read_bytes()
    for name in (b"learning_rate", b"evaluation/accuracy_by_slice/16x2", b"vocab_size"):
        assert name in text
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
