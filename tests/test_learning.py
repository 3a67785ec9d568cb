"""The README's claims on recall, at the fixed setting of experiments/mqar.py: what each mixer reaches, and by when."""

import contextlib

import chz
import pytest

from experiments import mqar
from training.loop import train

pytestmark = pytest.mark.slow


def accuracy(tmp_path, experiment, steps=None, schedule_over=1900):
    """Accuracy at `steps` of a run whose cosine falls over 1,900."""
    assert experiment.run.steps == schedule_over
    history: dict[int, float] = {}

    class Reached(Exception):
        pass

    def say(line):
        if "accuracy" in line and " step " in line:
            step = int(line.split(" step ")[1].split(":")[0].replace(",", ""))
            history[step] = float(line.split("accuracy ")[1].split(",")[0])
            if steps is not None and step >= steps:
                raise Reached

    experiment = chz.replace(experiment, run=chz.replace(experiment.run, directory=str(tmp_path / "run"), checkpoint_every=1900))
    with contextlib.suppress(Reached):
        train(experiment, say=say)
    return history[steps or max(history)]


def test_attention_recalls(tmp_path):
    assert accuracy(tmp_path, mqar.attention(), 700) >= 0.99


def test_landmark_recalls(tmp_path):
    assert accuracy(tmp_path, mqar.landmark(), 1000) >= 0.99


def test_based_recalls(tmp_path):
    assert accuracy(tmp_path, mqar.based()) >= 0.97


def test_mixture_of_heads_recalls(tmp_path):
    assert accuracy(tmp_path, mqar.mixture_of_heads()) >= 0.98


def test_a_window_answers_what_is_in_reach(tmp_path):
    """46.6% of queries have their key within 19 tokens: 17 of the window and two more through the convolution before it."""
    assert 0.37 <= accuracy(tmp_path, mqar.window()) <= 0.49


def test_convolution_alone_does_not_recall(tmp_path):
    assert accuracy(tmp_path, mqar.convolution()) <= 0.2
