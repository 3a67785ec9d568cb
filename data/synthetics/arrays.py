"""Tasks as NumPy arrays, for those who train with another framework."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from recollect.data.batch import Batch
from recollect.data.synthetics.task import SyntheticTask

IGNORED = -100
"""Label of positions at which nothing is asked: what PyTorch's cross-entropy ignores."""


def arrays(
    task: SyntheticTask,
    step: int,
    batch_size: int = 64,
    *,
    seed: int = 0,
    role: Literal["train", "evaluation"] = "train",
    slice: Any = None,
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    """Returns the tokens of one batch, and the label of each position: what the model should predict there, not at the
    next one; IGNORED where nothing is asked. Both are int32.

    Args:
      step: number of the batch in its stream; equal arguments give equal batches.
      role: "train", or "evaluation": examples that are never trained on.
      slice: one of the task's slices; None is the first.
    """
    batch: Any = numpy_batch(task, step, batch_size, seed=seed, role=role, slice=slice)
    labels = np.full(batch.tokens.shape, IGNORED, np.int32)
    positions = batch.target_positions
    if positions is None:
        positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    rows, targets = np.nonzero(batch.weights)
    labels[rows, positions[rows, targets]] = batch.targets[rows, targets]
    return batch.tokens, labels


def numpy_batch(
    task: SyntheticTask,
    step: int,
    batch_size: int = 64,
    *,
    seed: int = 0,
    role: Literal["train", "evaluation"] = "train",
    slice: Any = None,
) -> Batch:
    """Returns one batch whole, as NumPy arrays: what tasks with a source, types or vectors state beside tokens, too.
    Arguments are those of `arrays`."""
    return jax.device_get(_sampler(task, role, slice, batch_size)(seed, step))


@functools.lru_cache(maxsize=64)
def _sampler(task: SyntheticTask, role: str, slice: Any, batch_size: int) -> Any:
    draw = task.train_batch if role == "train" else task.evaluation_batch

    def batch(seed: jax.Array, step: jax.Array) -> Batch:
        return draw(seed, step, slice, batch_size)

    return jax.jit(batch)
