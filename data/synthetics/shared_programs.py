"""Slices whose batches have one shape, drawn in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from recollect.data.batch import Batch
from recollect.data.synthetics.task import SyntheticTask

Draw = Callable[..., Batch]


@functools.lru_cache(maxsize=256)
def slices_like(task: SyntheticTask, slice: Any) -> tuple[Any, ...]:
    """Returns the training slices whose batches have the shapes of a slice's: one compiled program trains them all."""

    def shapes(part: Any) -> Any:
        return jax.tree.map(jnp.shape, jax.eval_shape(lambda: task.train_batch(0, 0, part, 1)))

    return tuple(part for part in task.train_slices() if shapes(part) == shapes(slice))


def one_of(draws: Sequence[Draw], index: jax.Array) -> Draw:
    """Returns the function among `draws` (of seed and number) with a number that may be traced. Batches are of one
    length; those with fewer targets than others get further ones of weight 0."""
    most = max(jax.eval_shape(draw, 0, 0).targets.shape[1] for draw in draws)

    def draw(seed: Any, number: Any) -> Batch:
        return jax.lax.switch(index, [lambda one=one: _widened(one(seed, number), most) for one in draws])

    return draw


def _widened(batch: Batch, most: int) -> Batch:
    names = ("targets", "target_positions", "weights", "groups")
    arrays: dict[str, Any] = {name: array for name in names if (array := getattr(batch, name)) is not None}
    wider: dict[str, Any] = {
        name: jnp.pad(array, ((0, 0), (0, most - array.shape[1]))) for name, array in arrays.items()
    }
    return dataclasses.replace(batch, **wider)
