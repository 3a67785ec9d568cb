"""What follows from what a task states (contract.py): slices, streams of examples, scores. A task:

class Copying(SyntheticTask):
    def slice(self): return Slice(length=self.length)
    def sample(self, key, slice, batch_size): return Batch(...)    # pure; no position is labelled twice
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from recollect.configuration import Config, UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.contract import TaskContract, not_negative

Number = int | jax.Array
_TRAIN, _EVALUATION = 0x6D716100, 0x6D716101
"""Folded into the seed: two streams independent of each other, and of parameters and dropout of the same seed."""


@chz.chz(typecheck=True)
class Slice(Config):
    """Examples of one kind: `length` tokens; subclasses add other sizes. `weight` is the share of training calls, or in
    the mean over evaluation slices, where 0 reports a slice beside the mean."""

    length: int = chz.field(validator=at_least(1))
    weight: float = chz.field(default=1.0, validator=not_negative)

    @property
    def sizes(self) -> dict[str, int | float]:
        """What distinguishes the slices of a task, and their streams: {"length": 64, "pairs": 8}."""
        return {name: getattr(self, name) for name in chz.chz_fields(self) if name != "weight"}

    @property
    def name(self) -> str:
        """Name in metrics and tables: the sizes, 64x8."""
        return "x".join(f"{size:g}" if isinstance(size, float) else str(size) for size in self.sizes.values())


@chz.chz(typecheck=True)
class SyntheticTask(TaskContract):
    """Base of tasks that are drawn on the device: a batch is a pure function of (seed, number, slice)."""

    mixture: tuple[Slice, ...] = ()
    evaluation: tuple[Slice, ...] = ()
    made_on_device = True

    @chz.validate
    def _slices_fit(self) -> None:
        if any(factor <= 1 for factor in self.extrapolation):
            raise UserError(f"extrapolation={self.extrapolation}: factors must be above 1, for example (2, 4)")
        for role, slices in (("mixture", self.train_slices()), ("evaluation", self.evaluation_slices())):
            names = [part.name for part in slices]
            if not (all if role == "mixture" else any)(part.weight for part in slices):
                raise UserError(f"weight=0: {'each' if role == 'mixture' else 'one'} slice of {role} must have a share")
            for part in slices:
                if names.count(part.name) > 1:
                    raise UserError(f"{role} has slice {part.name} twice; give it once, with the sum of the weights")
                self.check(part)

    def train_slices(self) -> tuple[Any, ...]:
        """Returns the slices of the training mixture."""
        return self.mixture or (self.slice(),)

    def evaluation_slices(self) -> tuple[Any, ...]:
        """Returns the slices that are evaluated: by default those of training, equally weighted, and extrapolated."""
        slices = self.train_slices()
        if self.evaluation:
            return self.evaluation
        largest = max(slices, key=lambda part: tuple(part.sizes.values()))
        further = [self.scaled(largest, factor) for factor in self.extrapolation]
        return tuple(chz.replace(part, weight=float(part in slices)) for part in (*slices, *further))

    def scores(self, slices: tuple[Any, ...], batch: Batch, correct: Array, loss: Array) -> dict[str, Any]:
        """Returns (sum, count) by metric over the targets (b, p) of weight above 0 of a batch of one of `slices`."""
        weights = batch.weights
        asked = jnp.any(weights > 0, axis=1)
        exact = asked & jnp.all((correct > 0) | (weights == 0), axis=1)
        pairs = {"accuracy": (correct * weights, weights), "exact": (exact, asked), "loss": (loss * weights, weights)}
        sums = jax.tree.map(lambda values: jnp.sum(values, dtype=jnp.float32), pairs)
        return sums if self.breakdown is None else sums | self.scores_by_group(slices, batch, correct)

    def reported(self, shares: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the entries of an evaluation, of shares by metric and slice, with means and the ranking "metric"."""
        order = [part.name for part in self.evaluation_slices()]
        shares = {name: {part: one[part] for part in order} for name, one in shares.items()}
        means = {name: self.mean(one) for name, one in shares.items() if "_by_" not in name}
        by_slice = {name if "_by_" in name else f"{name}_by_slice": one for name, one in shares.items()}
        return {"metric": self.metric, **means, **by_slice}

    @property
    def lengths(self) -> list[int]:
        return sorted({part.length for part in (*self.train_slices(), *self.evaluation_slices())})

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def tokens_per_example(self) -> float:
        return sum(p.length * p.weight for p in self.train_slices()) / sum(p.weight for p in self.train_slices())

    def batch_shapes(self, batch_size: int) -> Batch:
        longest = max(self.train_slices(), key=lambda part: part.length)
        return jax.eval_shape(lambda: self.train_batch(0, 0, longest, batch_size))

    def mean(self, by_slice: Mapping[str, float]) -> float:
        """Returns the mean over evaluation slices by their weights."""
        slices = self.evaluation_slices()
        return sum(part.weight * by_slice[part.name] for part in slices) / sum(part.weight for part in slices)

    def result_entries(self) -> dict[str, Any]:
        """Returns "slices", the sizes of each, and where they are known "chance" and "chance_by_slice"."""
        slices = {part.name: part for part in self.evaluation_slices()}
        entries: dict[str, Any] = {"slices": {name: part.sizes for name, part in slices.items()}}
        known = {name: level for name, part in slices.items() if (level := self.chance(part)) is not None}
        return entries | ({"chance": self.mean(known), "chance_by_slice": known} if len(known) == len(slices) else {})

    def slice_for(self, seed: int, call_index: int) -> Any:
        """Returns the training slice of one device call, drawn by weight; the same for the same arguments."""
        slices = self.train_slices()
        ends = np.cumsum([part.weight for part in slices])
        draw = np.random.default_rng([seed, call_index]).random() * ends[-1]
        return slices[np.searchsorted(ends[:-1], draw, "right")]

    def train_batch(self, seed: Number, step: Number, slice: Any = None, batch_size: int = 64) -> Batch:
        """Returns the training batch of one step; `slice` None is the first one. Seed and step may be traced."""
        part = slice or self.train_slices()[0]
        if self.train_examples is None:
            return self.sample(_key(seed, _TRAIN, part, step), part, batch_size)
        from recollect.data.synthetics.finite_set import batch_of_set

        return batch_of_set(self, _key(seed, _TRAIN, part, self.train_examples), step, part, batch_size)

    def evaluation_batch(self, seed: Number, index: Number, slice: Any = None, batch_size: int = 64) -> Batch:
        """Returns evaluation batch number `index`, never one of the training stream; `slice` None is the first one."""
        part = slice or self.evaluation_slices()[0]
        return self.sample(_key(seed, _EVALUATION, part, index), part, batch_size)


def _key(seed: Number, role: int, part: Slice, number: Number) -> jax.Array:
    # The sizes are folded in: slices drawn at the same numbers are independent. A loop compiles sooner.
    sizes = [np.float32(size).view(np.uint32) if isinstance(size, float) else size for size in part.sizes.values()]
    folds = jnp.stack([jnp.asarray(fold, jnp.uint32) for fold in (role, *sizes, number)])
    key, _ = jax.lax.scan(lambda key, fold: (jax.random.fold_in(key, fold), None), jax.random.key(seed), folds)
    return key
