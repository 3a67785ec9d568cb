"""What a run logs, sent to TensorBoard or Weights & Biases as well: every number of metrics.jsonl, the learning rate,
and the config as hyperparameters."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from recollect.configuration import UserError, to_json
from recollect.configuration.io import flatten
from recollect.training.experiment import Experiment


class Board(Protocol):
    """Where records of metrics.jsonl go too."""

    def record(self, record: dict[str, Any]) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Ends what was opened."""


def open_boards(experiment: Experiment, folder: Path) -> list[Board]:
    """Returns the boards that the config asks for, `folder` being the run's.

    Raises:
      UserError: a package is not installed.
    """
    boards: list[Board] = []
    numbers = numbers_of(experiment)
    if experiment.run.tensorboard:
        boards.append(TensorBoard(experiment, folder, numbers))
    if experiment.run.wandb is not None:
        boards.append(WeightsAndBiases(experiment, folder, numbers))
    return boards


Numbers = Callable[[dict[str, Any]], dict[str, float]]


def numbers_of(experiment: Experiment) -> Numbers:
    """Returns a function that returns the numbers of a record by name: "loss", "throughput/tokens_per_second",
    "evaluation/accuracy", "evaluation/accuracy_by_slice/64x4", and of steps "learning_rate"."""
    optimizer, steps = experiment.optimizer, experiment.run.steps
    cpu = jax.local_devices(backend="cpu")[0]  # one number: not worth a program on the device that trains

    def numbers(record: dict[str, Any]) -> dict[str, float]:
        values = {path.replace(".", "/"): value for path, value in flatten(record).items() if path != "step"}
        if "evaluation" not in record:
            with jax.default_device(cpu):
                rate = optimizer.rate(jnp.float32(record["step"] - 1), steps, jnp.float32(optimizer.learning_rate))
            values["learning_rate"] = float(rate)
        return {name: value for name, value in values.items() if isinstance(value, int | float)}

    return numbers


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows them."""

    def __init__(self, experiment: Experiment, folder: Path, numbers: Numbers):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "run.tensorboard=True needs the package tensorboardX: pip install 'recollect[tensorboard]'"
            ) from None
        self._numbers, self._writer = numbers, SummaryWriter(str(folder))
        config = flatten(to_json(experiment), leaf=str)
        rows = [f"| {path} | {value} |" for path, value in config.items()]
        self._writer.add_text("config", "\n".join(["| field | value |", "|---|---|", *rows]))

    def record(self, record: dict[str, Any]) -> None:
        """Writes the numbers of a record."""
        for name, value in self._numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, of the project "recollect" unless WANDB_PROJECT names another; `run.wandb=offline`
    keeps it in the run's folder wandb/, from which `wandb sync` sends it. A resumed run goes on as the same one."""

    def __init__(self, experiment: Experiment, folder: Path, numbers: Numbers):
        try:
            import wandb
        except ImportError:
            wanted = f"run.wandb={experiment.run.wandb} needs the package wandb"
            raise UserError(f"{wanted}: pip install 'recollect[wandb]'") from None
        self._numbers = numbers
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "recollect"),
            name=experiment.name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            dir=str(folder),
            config=to_json(experiment),
            mode=experiment.run.wandb,
            resume="allow" if experiment.run.wandb == "online" else None,
        )

    def record(self, record: dict[str, Any]) -> None:
        """Sends the numbers of a record; what is not finite is left out."""
        numbers = {name: value for name, value in self._numbers(record).items() if math.isfinite(value)}
        self._run.log({"step": record["step"], **numbers})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()
