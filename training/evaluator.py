"""Evaluation of a run's parameters on its data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from recollect.configuration.console import doing
from recollect.data.batch import Batch
from recollect.data.synthetics import shared_programs
from recollect.models.functional import Params
from recollect.training.step import Program, as_uint32

DRAWN_TOGETHER = 64  # evaluation examples per draw, whatever the batch size: a draw depends on how many they are


def evaluate(program: Program, params: Params, seed: int, *, final: bool = False) -> dict[str, Any]:
    """Returns the metrics of one run: of a task `SyntheticTask.reported`, its examples drawn by `seed`; of text
    "bits_per_byte" and "loss", and with `final` also bits by slice and of a bigram model."""
    if program.data.made_on_device:
        return evaluate_members(program, params, seed)[0]
    from recollect.training.host_batches import evaluate_on_text

    return evaluate_on_text(program, params, final=final)


def evaluate_members(program: Program, params: Params, seeds: int | Sequence[int]) -> list[dict[str, Any]]:
    """Returns a task's metrics for each member of a population, or for the one run of a lone program."""
    task, rows = program.data, [dict[str, dict[str, Any]]() for _ in range(program.population or 1)]
    for length in task.lengths:
        doing(f"evaluating length {length:,}")
        parts = tuple(part for part in task.evaluation_slices() if part.length == length)
        for name, sums in (jax.device_get(_sums(program, params, seeds, parts)) if parts else {}).items():
            totals, counts = sums if program.population else (array[None] for array in sums)
            for (row, metrics), (index, part) in itertools.product(enumerate(rows), enumerate(parts)):
                total, count = totals[row, index], counts[row, index]
                share = task.shares_by_group(part, total, count) if total.ndim else float(total) / float(count)
                metrics.setdefault(name, {})[part.name] = share
    return [task.reported(metrics) for metrics in rows]


def _sums(program: Program, params: Params, seeds: int | Sequence[int], parts: tuple[Any, ...]) -> Any:
    """Returns `SyntheticTask.scores` over the evaluation examples of slices of one length, (slices,) per member."""
    task, examples = program.data, program.data.evaluation_examples
    size, together = min(program.experiment.run.batch_size, examples), min(DRAWN_TOGETHER, examples)
    draws = [functools.partial(task.evaluation_batch, slice=part, batch_size=together) for part in parts]

    def batched(chunks: jax.Array) -> jax.Array:  # the last batch is filled with zeros, whose weights do not count
        rows = chunks.reshape(-1, *chunks.shape[2:])[:examples]
        return jnp.pad(rows, [(0, -examples % size), *[(0, 0)] * (rows.ndim - 1)]).reshape(-1, size, *rows.shape[1:])

    def of_slice(params: Params, seed: jax.Array, index: jax.Array) -> Any:
        def scores(batch: Batch) -> Any:
            entropy, out = program.losses_of(params, batch, batch.weights)
            return task.scores(parts, batch, entropy.correct, entropy.loss) | program.measured(out)

        draw = draws[0] if len(draws) == 1 else shared_programs.one_of(draws, index)
        drawn = jax.lax.map(lambda number: draw(seed, number), jnp.arange(-(-examples // together)))
        batches = jax.tree.map(batched, drawn)
        return jax.tree.map(lambda sums: jnp.sum(sums, axis=0), jax.lax.map(scores, batches))

    def run(params: Params, seed: jax.Array) -> Any:
        return jax.lax.map(functools.partial(of_slice, params, seed), jnp.arange(len(parts)))

    return program.jit(("evaluate", examples, parts), program.vectorised(run))(params, as_uint32(seeds))
