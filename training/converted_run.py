"""A trained run as one of other mixers: its parameters in the model that overrides describe, maybe with attention
transfer."""

from __future__ import annotations

import dataclasses

import chz

from recollect.configuration import UserError
from recollect.models.adaptation import merged
from recollect.models.conversion import converted
from recollect.training.attention_transfer import transferred
from recollect.training.checkpoint.load import SavedRun
from recollect.training.experiment import Experiment


def converted_run(run: SavedRun, experiment: Experiment, transfer_steps: int = 0) -> tuple[SavedRun, list[float]]:
    """Returns a run whose experiment is `experiment`, with the parameters that `models.conversion` makes of those of
    `run`, and the losses of attention transfer on the training data of `run`.

    Args:
      experiment: that of `run` with other mixers.
      transfer_steps: of attention transfer; 0 for none.

    Raises:
      UserError: its model cannot have these parameters, or attention transfer has nothing to train.
    """
    if not 0 <= transfer_steps < 2**31:
        raise UserError(f"transfer={transfer_steps}: must be from 0 to {2**31 - 1:,} steps")
    params, model = merged(run.params, run.experiment.model, run.vocabulary)
    before = chz.replace(run.experiment, model=model)
    student = converted(params, model, experiment.model, run.vocabulary)
    losses: list[float] = []
    if transfer_steps:
        student, losses = transferred(params, before, student, experiment, steps=transfer_steps)
    return dataclasses.replace(run, experiment=experiment, params=student), losses
