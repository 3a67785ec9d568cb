"""What a synthetic task states; what follows from it is in task.py."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import chz
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import requires
from recollect.data.batch import Batch, DataConfig

example_count = requires(lambda n: 1 <= n < 2**31, f"must be at least 1 and below {2**31}")
not_negative = requires(lambda weight: 0 <= weight < math.inf, "must be finite and not negative")


@chz.chz(typecheck=True)
class TaskContract(DataConfig):
    """What every task states of itself.

    Attributes:
      mixture: training slices, of which each device call draws one by weight; empty for the one of the task's fields.
      evaluation: evaluation slices; empty for those of training.
      evaluation_examples: examples per evaluation slice.
      extrapolation: factors by which the largest training slice is scaled (`scaled`) for further evaluation slices,
        reported beside the mean.
      train_examples: size of a finite training set per slice, shuffled in every epoch; None draws new examples forever.
    """

    evaluation_examples: int = chz.field(default=1000, validator=example_count)
    extrapolation: tuple[int, ...] = (2, 4, 8)
    train_examples: int | None = chz.field(default=None, validator=example_count)

    metric: ClassVar[str] = "accuracy"
    """What runs are ranked by, a key of `evaluation.METRICS`: "accuracy" of labelled positions, or "exact", the share
    of examples with every label right (as in greedy generation, which would feed itself the same labels)."""

    pattern: ClassVar[str] = "causal self"
    """The pattern of attention that a model needs, as layers/patterns.py names it; cross ones have a `Batch.source`."""

    breakdown: ClassVar[str | None] = None
    """What `Batch.groups` numbers, for example "hop"; accuracy is reported by it."""

    def slice(self) -> Any:
        """Returns the slice that the task's own fields state; not called where `mixture` names others."""
        raise NotImplementedError

    def scaled(self, slice: Any, factor: int) -> Any:
        """Returns a slice `factor` times as hard: longer, unless a task overrides it."""
        return chz.replace(slice, length=factor * slice.length)

    def check(self, slice: Any) -> None:
        """Raises UserError where the task has no examples of a slice, with what would fit."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], slice: Any, batch_size: int) -> Batch:
        """Returns examples of a slice, a pure function of the key."""

    def chance(self, slice: Any) -> float | None:
        """Returns what a guess scores in `metric`; None where that is unknown."""
        return None

    def group_names(self, slice: Any) -> tuple[str, ...]:
        """Returns the names of the values of `Batch.groups`, by number."""
        return ()

    def spelling(self, token: int) -> str:
        """Returns a token as a reader sees it."""
        return str(token)

    def scores_by_group(self, slices: tuple[Any, ...], batch: Batch, correct: Array) -> dict[str, Any]:
        """Returns `scores` by group, arrays (groups,), where the task has a `breakdown`."""
        groups = jnp.zeros(max(len(self.group_names(part)) for part in slices)).at[batch.groups]
        return {f"accuracy_by_{self.breakdown}": (groups.add(correct * batch.weights), groups.add(batch.weights))}

    def shares_by_group(self, slice: Any, total: Any, count: Any) -> dict[str, float]:
        """Returns total / count by the name of a group, without groups that had no target."""
        named = zip(self.group_names(slice), total, count, strict=False)
        return {name: float(right) / float(number) for name, right, number in named if number}
