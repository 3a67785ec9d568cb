"""Evaluation of a run's parameters on its data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.configuration.console import doing
from recollect.data.batch import Batch
from recollect.models.functional import Params
from recollect.training.step import Program, as_uint32

DRAWN_TOGETHER = 64
"""Evaluation examples per draw, whatever the batch size: a draw depends on how many they are."""


def evaluate(program: Program, params: Params, seed: int, *, final: bool = False) -> dict[str, Any]:
    """Returns the metrics of one run.

    A task has "accuracy", "exact", "loss" (means over slices, by weight) and each by slice; text has "bits_per_byte"
    and "loss".

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
    task = program.data
    rows: list[dict[str, dict[str, Any]]] = [{} for _ in range(program.population or 1)]
    for length in task.lengths:
        parts = tuple(part for part in task.evaluation_slices() if part.length == length)
        if not parts:
            continue
        doing(f"evaluating length {length:,}")
        for name, sums in jax.device_get(_sums(program, params, seeds, parts)).items():
            totals, counts = sums if program.population else (array[None] for array in sums)
            for (row, metrics), (index, part) in itertools.product(enumerate(rows), enumerate(parts)):
                share = _share(task.group_names(part), totals[row, index], counts[row, index])
                metrics.setdefault(name, {})[part.name] = share
    return [_reported(task, metrics) for metrics in rows]


def _share(groups: Sequence[str], total: np.ndarray, count: np.ndarray) -> Any:
    """Returns total / count; of arrays by group a dict, without groups that had no target."""
    if total.ndim == 0:
        return float(total) / float(count)
    return {name: float(t) / float(n) for name, t, n in zip(groups, total, count, strict=False) if n}


def _reported(task: Any, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the means over slices, and each metric by slice in the task's order of slices."""
    names = [part.name for part in task.evaluation_slices()]
    by_slice = {metric: {name: values[name] for name in names} for metric, values in metrics.items()}
    means = {metric: task.mean(values) for metric, values in by_slice.items() if "_by_" not in metric}
    return {"metric": task.metric, **means} | {
        metric if "_by_" in metric else f"{metric}_by_slice": values for metric, values in by_slice.items()
    }


def _sums(program: Program, params: Params, seeds: int | Sequence[int], parts: tuple[Any, ...]) -> Any:
    """Returns `SyntheticTask.scores` over the evaluation examples of slices of one length, (slices,) per member."""
    task, examples = program.data, program.data.evaluation_examples
    size, together = min(program.experiment.run.batch_size, examples), min(DRAWN_TOGETHER, examples)
    groups = max(len(task.group_names(part)) for part in parts)
    draws = [functools.partial(task.evaluation_batch, slice=part, batch_size=together) for part in parts]
    most = max(jax.eval_shape(draw, 0, 0).targets.shape[1] for draw in draws)

    def scores(params: Params, batch: Batch) -> Any:
        entropy, _ = program.losses_of(params, batch, batch.weights)
        return task.scores(batch, entropy.correct, entropy.loss, groups)

    def of_slice(params: Params, seed: jax.Array, index: jax.Array) -> Any:
        def draw(number: jax.Array) -> Batch:
            return jax.lax.switch(index, [lambda one=one: _widened(one(seed, number), most) for one in draws])

        drawn = jax.lax.map(draw, jnp.arange(-(-examples // together)))
        batches = jax.tree.map(lambda leaf: _batches(leaf.reshape(-1, *leaf.shape[2:])[:examples], size), drawn)
        sums = jax.lax.map(lambda batch: scores(params, batch), batches)
        return jax.tree.map(lambda sum_: jnp.sum(sum_, axis=0), sums)

    def run(params: Params, seed: jax.Array) -> Any:
        return jax.lax.map(lambda index: of_slice(params, seed, index), jnp.arange(len(parts)))

    return program.jit(("evaluate", examples, parts), program.vectorised(run))(params, as_uint32(seeds))


def _widened(batch: Batch, most: int) -> Batch:
    """Returns a batch with `most` targets per example, by targets of weight 0."""
    names = ("targets", "target_positions", "weights", "groups")
    arrays = {name: array for name in names if (array := getattr(batch, name)) is not None}
    wider = {name: jnp.pad(array, ((0, 0), (0, most - array.shape[1]))) for name, array in arrays.items()}
    return dataclasses.replace(batch, **wider)


def _batches(rows: jax.Array, size: int) -> jax.Array:
    """Returns rows in batches (n, size, ...), the last one filled with zeros, whose weights do not count."""
    count = -(-len(rows) // size)
    return jnp.pad(rows, [(0, count * size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]).reshape(
        count, size, *rows.shape[1:]
    )
