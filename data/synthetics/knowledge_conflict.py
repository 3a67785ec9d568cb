"""Knowledge conflict: facts that never change, learned in the weights, and contexts that contradict some of them.

    tokens   s1 o1' s2 o2' | s2   s7   s1   s9
    label                    o2'  o7   o1'  o9      (the context's object where it names one, else the fact's)

Each subject has one object for good. A context gives `overrides` subjects other objects; then subjects are asked, some
of the context and some of memory, in random order. Accuracy is reported for both.

Source: the setting of Jin et al., Cutting Off the Head Ends the Conflict (arXiv 2402.18154), with tokens for facts.
"""

from __future__ import annotations

import functools

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_SEPARATOR, _FIRST = 0, 1


@chz.chz(typecheck=True)
class ConflictSlice(Slice):
    """Examples of one size: length 2 overrides + 1 + from_context + from_memory."""

    overrides: int = chz.field(validator=at_least(0))
    from_context: int = chz.field(validator=at_least(0))
    from_memory: int = chz.field(validator=at_least(0))


@chz.chz(typecheck=True)
class KnowledgeConflict(SyntheticTask):
    """Objects of subjects, from the context or from memory.

    Attributes:
      subjects, objects: token ids of each; the objects of facts are drawn by `facts`.
      overrides: subjects that the context gives another object.
      from_context, from_memory: subjects asked that the context names, and that it doesn't.
      facts: seed of the facts, the same in training and evaluation.
    """

    subjects: int = chz.field(default=128, validator=at_least(1))
    objects: int = chz.field(default=128, validator=at_least(2))
    overrides: int = 4
    from_context: int = 4
    from_memory: int = 4
    facts: int = 0

    breakdown = "source"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.subjects + self.objects

    def slice(self) -> ConflictSlice:
        return conflict_slice(self.overrides, self.from_context, self.from_memory)

    def scaled(self, slice: ConflictSlice, factor: int) -> ConflictSlice:
        return conflict_slice(factor * slice.overrides, factor * slice.from_context, factor * slice.from_memory)

    def check(self, slice: ConflictSlice) -> None:
        if slice.length != (length := 2 * slice.overrides + 1 + slice.from_context + slice.from_memory):
            raise UserError(f"length={slice.length}: these facts and questions take {length} tokens")
        if slice.from_context > slice.overrides:
            raise UserError(f"from_context={slice.from_context}: must be at most overrides={slice.overrides}")
        if not slice.from_context + slice.from_memory:
            raise UserError("from_memory=0: with from_context=0 nothing is asked, take 1")
        if self.subjects < (needed := slice.overrides + slice.from_memory):
            raise UserError(f"subjects={self.subjects}: {needed} different ones are needed, raise it to {needed}")

    def chance(self, slice: ConflictSlice) -> float:
        return 1 / self.objects

    def group_names(self, slice: ConflictSlice) -> tuple[str, ...]:
        return ("memory", "context")

    def spelling(self, token: int) -> str:
        subject, other = token - _FIRST, token - _FIRST - self.subjects
        return "|" if subject < 0 else f"s{subject}" if other < 0 else f"o{other}"

    def sample(self, key: Key[Array, ""], slice: ConflictSlice, batch_size: int) -> Batch:
        """Returns a batch with from_context + from_memory targets per row."""
        b, overrides = batch_size, slice.overrides
        of_subjects, of_objects, of_list, of_order = jax.random.split(key, 4)
        subjects = distinct(of_subjects, b, self.subjects, overrides + slice.from_memory)
        objects = jnp.asarray(fact_objects(self.subjects, self.objects, self.facts))[subjects]
        changes = jax.random.randint(of_objects, (b, overrides), 1, self.objects, jnp.int32)
        objects = objects.at[:, :overrides].set((objects[:, :overrides] + changes) % self.objects)
        subjects, objects = _FIRST + subjects, _FIRST + self.subjects + objects
        context = jnp.stack([subjects[:, :overrides], objects[:, :overrides]], axis=2)
        listed = shuffled(of_list, b, overrides)  # which are asked says no place
        context = jnp.take_along_axis(context, listed[:, :, None], axis=1).reshape(b, 2 * overrides)
        asked = np.r_[: slice.from_context, overrides : overrides + slice.from_memory]
        order = shuffled(of_order, b, len(asked))
        questions, targets = (jnp.take_along_axis(array[:, asked], order, axis=1) for array in (subjects, objects))
        separator = jnp.full((b, 1), _SEPARATOR, jnp.int32)
        tokens = jnp.concatenate([context, separator, questions], axis=1)
        positions = jnp.broadcast_to(2 * overrides + 1 + jnp.arange(len(asked)), targets.shape)
        weights = jnp.ones(targets.shape, jnp.float32)
        return Batch(tokens, targets, positions, weights, groups=jnp.asarray(asked < overrides, jnp.int32)[order])


def conflict_slice(overrides: int, from_context: int, from_memory: int) -> ConflictSlice:
    """Returns the slice of three sizes."""
    length = 2 * overrides + 1 + from_context + from_memory
    return ConflictSlice(length=length, overrides=overrides, from_context=from_context, from_memory=from_memory)


@functools.lru_cache(maxsize=8)
def fact_objects(subjects: int, objects: int, seed: int) -> np.ndarray:
    """Returns the number of each subject's object, int32 (subjects,), a uniform draw."""
    return np.random.default_rng(seed).integers(0, objects, subjects, dtype=np.int32)
