"""Set disjointness: two sets have one element in common; which?

    tokens   a1 a2 a3 | b1 b2 ?
    label                     the element in both

A causal model of fixed state has to remember the first set, so accuracy depends on which of the two comes first: take
mixtures of slices such as (4, 64), (64, 4) and (16, 16).

Source: Arora et al., Just Read Twice (arXiv 2407.05483).
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_SEPARATOR, _ASK, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class SetSlice(Slice):
    """Examples of one size: `first` and `second` elements, length first + second + 2."""

    first: int = chz.field(validator=at_least(1))
    second: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class SetDisjointness(SyntheticTask):
    """The one element that two sets share.

    Attributes:
      vocab_size: token ids; the first two are the separator and the question.
      first, second: sizes of the sets, of the one slice where `mixture` names no others.
    """

    vocab_size: int = 2048
    first: int = 16
    second: int = 16

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> SetSlice:
        return set_slice(self.first, self.second)

    def scaled(self, slice: SetSlice, factor: int) -> SetSlice:
        return set_slice(factor * slice.first, factor * slice.second)

    def check(self, slice: SetSlice) -> None:
        if slice.length != (length := slice.first + slice.second + 2):
            raise UserError(f"length={slice.length}: sets of {slice.first} and {slice.second} take {length} tokens")
        if self.vocab_size < (needed := slice.first + slice.second - 1 + _FIRST):
            raise UserError(f"vocab_size={self.vocab_size}: the sets need at least {needed}")

    def chance(self, slice: SetSlice) -> float:
        return 1 / min(slice.first, slice.second)  # a guess among the smaller set

    def spelling(self, token: int) -> str:
        return "|?"[token] if token < _FIRST else str(token - _FIRST)

    def sample(self, key: Key[Array, ""], slice: SetSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per row."""
        of_elements, of_place, of_shared = jax.random.split(key, 3)
        elements = distinct(of_elements, batch_size, self.vocab_size - _FIRST, slice.first + slice.second - 1) + _FIRST
        first = elements[:, : slice.first]
        shared = jnp.take_along_axis(first, jax.random.randint(of_shared, (batch_size, 1), 0, slice.first), axis=1)
        second = jnp.concatenate([elements[:, slice.first :], shared], axis=1)
        order = shuffled(of_place, batch_size, slice.second)
        mark = jnp.zeros((batch_size, 1), jnp.int32)
        second = jnp.take_along_axis(second, order, axis=1)
        return answered(jnp.concatenate([first, mark + _SEPARATOR, second, mark + _ASK], axis=1), shared)


def set_slice(first: int, second: int, weight: float = 1.0) -> SetSlice:
    """Returns the slice of two sizes."""
    return SetSlice(length=first + second + 2, first=first, second=second, weight=weight)
