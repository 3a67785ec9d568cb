"""Experiments that train in a second: recall, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chz
import numpy as np

from recollect.data.synthetics import MQAR
from recollect.data.text.dataset import Text
from recollect.layers import Attention, BaseConvolution, LinearAttention
from recollect.layers.modules.positions import Rotary
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW


def tiny(directory: Path, *, learning_rate: float = 1e-2, seed: int = 0, **run: Any) -> Experiment:
    settings = {
        "steps": 60,
        "batch_size": 16,
        "steps_per_call": 10,
        "evaluate_every": 20,
        "checkpoint_every": 20,
        "log_every": 10,
    }
    return Experiment(
        name="tiny",
        model=LanguageModel(
            width=16, stages=repeat(BaseConvolution(kernel=3), LinearAttention(feature_dim=4), depth=2)
        ),
        data=MQAR(vocab_size=32, length=16, pairs=2, evaluation_examples=50),
        optimizer=AdamW(learning_rate=learning_rate, decay_everything=True),
        run=chz.replace(Run(), **{**settings, "seed": seed, "directory": str(directory), **run}),
    )


def tiny_text(directory: Path, corpus: Path, **run: Any) -> Experiment:
    """A text experiment on the files in `corpus` (see `write_corpus`)."""
    settings = {
        "steps": 24,
        "batch_size": 4,
        "steps_per_call": 4,
        "evaluate_every": 12,
        "checkpoint_every": 8,
        "log_every": 1,
    }
    return Experiment(
        name="tiny_text",
        model=LanguageModel(width=16, stages=repeat(Attention(heads=2, positions=Rotary()), depth=1), mlp=None),
        data=Text(source=str(corpus), length=32, held_out_bytes=256),
        optimizer=AdamW(learning_rate=1e-2),
        run=chz.replace(Run(), **{**settings, "directory": str(directory), **run}),
    )


def write_corpus(folder: Path) -> Path:
    """Forty files of random letters, 1 to 400 of them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(40):
        (folder / f"{index}.txt").write_bytes(
            random.integers(97, 123, int(random.integers(1, 400)), np.uint8).tobytes()
        )
    return folder
