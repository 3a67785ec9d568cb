"""A recall experiment that trains in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chz

from data.synthetics import MQAR
from layers import BaseConvolution, LinearAttention
from models import LanguageModel, repeat
from training.experiment import Experiment, Run
from training.optimizer import AdamW


def tiny(directory: Path, *, learning_rate: float = 1e-2, seed: int = 0, **run: Any) -> Experiment:
    settings = {"steps": 60, "batch_size": 16, "steps_per_call": 10, "evaluate_every": 20, "checkpoint_every": 20, "log_every": 10}
    return Experiment(
        name="tiny",
        model=LanguageModel(width=16, stages=repeat(BaseConvolution(kernel=3), LinearAttention(feature_dim=4), depth=2)),
        data=MQAR(vocab_size=32, length=16, pairs=2, evaluation_examples=50),
        optimizer=AdamW(learning_rate=learning_rate, decay_everything=True),
        run=chz.replace(Run(), **{**settings, "seed": seed, "directory": str(directory), **run}),
    )
