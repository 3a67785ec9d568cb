"""Opens the newest checkpoint of a run, finished or not: its parameters and config, evaluated or generated from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError, apply_overrides
from recollect.data.text.dataset import Text
from recollect.models.functional import FunctionalModel, Params, flatten
from recollect.models.generation import generate
from recollect.training.checkpoint.orbax_folder import load_params
from recollect.training.evaluator import evaluate
from recollect.training.experiment import Experiment
from recollect.training.step import program_for


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's parameters (numpy), the config they belong to (overrides applied), and the step."""

    experiment: Experiment
    params: Params
    step: int


def open_run(path: Path, overrides: list[str] | None = None) -> SavedRun:
    """Returns the newest checkpoint of the run in `path`.

    Args:
      overrides: changes for this use; they must leave the parameters' shapes as they are (data, `retrieve`, ... may
        change).

    Raises:
      UserError: no run there, a damaged checkpoint, or overrides that need other parameters.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}")
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is not a run folder: it has no checkpoints/")
    params, config, step = load_params(path / "checkpoints", ema=True)
    if not isinstance(config, Experiment):
        raise UserError(f"{path}: its checkpoint holds a {type(config).__name__}, not an Experiment")
    experiment = apply_overrides(config, overrides or [])
    model = FunctionalModel(experiment.model, experiment.data.vocabulary)
    saved, expected = (
        {name: leaf.shape for name, leaf in flatten(tree).items()} for tree in (params, model.abstract_params())
    )
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise UserError(
                f"{path}: the parameters do not fit this config: {name} "
                f"({saved.get(name)} there, {expected.get(name)} asked for)"
            )
    return SavedRun(experiment, params, step)


def evaluate_run(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Returns metrics of the newest checkpoint on its (or the overridden) evaluation data."""
    run = open_run(path, overrides)
    metrics = evaluate(program_for(run.experiment), run.params, run.experiment.run.seed, final=True)
    return {"name": run.experiment.name, "step": run.step, **metrics}


def continue_prompt(
    path: Path, overrides: list[str], prompt: str, length: int, temperature: float, top_p: float, seed: int
) -> str:
    """Returns the prompt and its continuation as text.

    Raises:
      UserError: the run is no text model's, or an impossible setting.
    """
    run = open_run(path, overrides)
    data = run.experiment.data
    if not isinstance(data, Text):
        raise UserError(f"{path} is a {type(data).__name__} run; generate needs a text model")
    model = FunctionalModel(run.experiment.model, data.vocabulary)
    tokens = generate(
        model, run.params, np.array([data.encode(prompt)]), length, temperature=temperature, top_p=top_p, seed=seed
    )
    return prompt + data.decode(tokens[0])
