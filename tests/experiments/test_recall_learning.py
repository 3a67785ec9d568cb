"""The README's claims on recall, at the fixed setting of experiments/mqar.py: what each mixer reaches, and by when."""

import contextlib

import chz
import pytest

from recollect.experiments import mqar
from recollect.training.train import train

pytestmark = pytest.mark.slow


def accuracy(tmp_path, experiment, *, goal: float | None = None) -> dict[int, float]:
    """Accuracy by step of a run at the fixed setting, cut off once it reaches `goal`."""
    assert experiment.run.steps == 1900
    history: dict[int, float] = {}

    class Reached(Exception):
        pass

    def say(line):
        if "accuracy" in line and " step " in line:
            step = int(line.split(" step ")[1].split(":")[0].replace(",", ""))
            history[step] = float(line.split("accuracy ")[1].split(",")[0])
            if goal is not None and history[step] >= goal:
                raise Reached

    experiment = chz.replace(
        experiment, run=chz.replace(experiment.run, directory=str(tmp_path / "run"), checkpoint_every=1900)
    )
    with contextlib.suppress(Reached):
        train(experiment, log=say)
    print(history)
    return history


def reached(history: dict[int, float], goal: float, step: int) -> bool:
    return any(value >= goal for at, value in history.items() if at <= step)


def test_attention_recalls(tmp_path):
    assert reached(accuracy(tmp_path, mqar.attention(), goal=0.99), 0.99, 700)


def test_landmark_recalls(tmp_path):
    assert reached(accuracy(tmp_path, mqar.variant("landmark"), goal=0.99), 0.99, 1000)


def test_based_recalls(tmp_path):
    assert reached(accuracy(tmp_path, mqar.variant("based"), goal=0.97), 0.97, 1900)


def test_mixture_of_heads_recalls(tmp_path):
    assert reached(accuracy(tmp_path, mqar.variant("mixture_of_heads"), goal=0.98), 0.98, 1900)


def test_a_window_answers_what_is_in_reach(tmp_path):
    """46.6% of queries have their key within 19 tokens: 17 of the window and two more through the convolution before
    it."""
    assert 0.37 <= accuracy(tmp_path, mqar.variant("window"))[1900] <= 0.49


def test_convolution_alone_does_not_recall(tmp_path):
    assert max(accuracy(tmp_path, mqar.variant("convolution")).values()) <= 0.2
