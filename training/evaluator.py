"""Evaluation of a run's parameters on its data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from recollect.configuration.console import doing
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
    from recollect.training.host_batches import evaluate_on_text

    return evaluate_on_text(program, params, final=final)


def evaluate_members(program: Program, params: Params, seeds: int | Sequence[int]) -> list[dict[str, Any]]:
    """Returns a task's metrics for each member of a population, or for the one run of a lone program."""
    rows: list[dict[str, Any]] = [{"accuracy": {}, "loss": {}} for _ in range(program.population or 1)]
    slices = program.data.evaluation_slices()
    for number, part in enumerate(slices, 1):
        doing(f"evaluating {number} of {len(slices)}")
        sums = jax.device_get(program.evaluate(params, seeds, program.data.examples_per_slice, part))
        for index, row in enumerate(rows):
            loss, correct, weight = (float(np.reshape(sums[name], -1)[index]) for name in ("loss", "correct", "weight"))
            row["accuracy"][part.name] = correct / weight
            row["loss"][part.name] = loss / weight
    means = [{name: sum(by_slice.values()) / len(by_slice) for name, by_slice in row.items()} for row in rows]
    return [mean | {f"{name}_by_slice": row[name] for name in row} for mean, row in zip(means, rows, strict=True)]
