"""Evaluation of a run's parameters on its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from recollect.data.batch import Batch
from recollect.models.functional import Params
from recollect.training.step import Program


def evaluate(program: Program, params: Params, seed: int, *, final: bool = False) -> dict[str, Any]:
    """Returns the metrics of one run.

    A task has "accuracy" and "loss" (means over slices) and both by slice; text has "bits_per_byte" and "loss".

    Args:
      seed: of a task's evaluation examples.
      final: a run's last evaluation: text is then also measured by slice and against a bigram model.
    """
    if program.data.made_on_device:
        return evaluate_members(program, params, seed)[0]
    return _evaluate_text(program, params, final)


def evaluate_members(program: Program, params: Params, seeds: int | Sequence[int]) -> list[dict[str, Any]]:
    """Returns a task's metrics for each member of a population, or for the one run of a lone program."""
    rows: list[dict[str, Any]] = [{"accuracy": {}, "loss": {}} for _ in range(program.population or 1)]
    for part in program.data.evaluation_slices():
        sums = jax.device_get(program.evaluate(params, seeds, program.data.examples_per_slice, part))
        for index, row in enumerate(rows):
            loss, correct, weight = (float(np.reshape(sums[name], -1)[index]) for name in ("loss", "correct", "weight"))
            row["accuracy"][part.name] = correct / weight
            row["loss"][part.name] = loss / weight
    return [
        {
            **{name: sum(by_slice.values()) / len(by_slice) for name, by_slice in row.items()},
            **{f"{name}_by_slice": by_slice for name, by_slice in row.items()},
        }
        for row in rows
    ]


def _evaluate_text(program: Program, params: Params, final: bool) -> dict[str, Any]:
    from recollect.evaluation.text_slices import evaluate_text
    from recollect.training.distributed.host import current_host
    from recollect.training.host_batches import on_mesh

    def losses(batch: Batch) -> np.ndarray:
        loss = program.evaluate_on(params, on_mesh(batch, program.mesh))["loss"]
        return np.asarray(loss if loss.is_fully_addressable else current_host().whole(loss))

    return evaluate_text(losses, program.data, program.experiment.run.batch_size, final=final)
