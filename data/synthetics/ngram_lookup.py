"""N-gram lookup: an n-gram that occurs once in a text; what follows it there?

    tokens   b c | e a b c d a f | d     (prefix: the n-gram comes before the text)
    label                        d a

    tokens   e a b c d a f | b c d       (suffix: after it)
    label                      d a

Source: Jelassi et al., Repeat After Me (arXiv 2402.01032).
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.task import Slice, SyntheticTask

_SEPARATOR, _FIRST = 0, 1


@chz.chz(typecheck=True)
class LookupSlice(Slice):
    """Examples of one size: a text of `context` symbols."""

    context: int = chz.field(validator=at_least(2))


@chz.chz(typecheck=True)
class NGramLookup(SyntheticTask):
    """The symbols that follow an n-gram in a text.

    Attributes:
      symbols: how many there are to draw the text from.
      context: symbols of the text.
      ngram, answer: symbols of the n-gram and of the answer.
      order: whether the n-gram comes before the text ("prefix") or after it ("suffix").
    """

    symbols: int = chz.field(default=26, validator=at_least(2))
    context: int = 64
    ngram: int = chz.field(default=3, validator=at_least(1))
    answer: int = chz.field(default=3, validator=at_least(1))
    order: Literal["prefix", "suffix"] = "suffix"

    breakdown = "place"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.symbols

    def slice(self) -> LookupSlice:
        return LookupSlice(length=self._length(self.context), context=self.context)

    def scaled(self, slice: LookupSlice, factor: int) -> LookupSlice:
        return LookupSlice(length=self._length(factor * slice.context), context=factor * slice.context)

    def _length(self, context: int) -> int:
        return self.ngram + context + self.answer + (self.order == "prefix")

    def check(self, slice: LookupSlice) -> None:
        if slice.length != (length := self._length(slice.context)):
            raise UserError(f"length={slice.length}: a text of {slice.context} symbols takes {length} tokens")
        if slice.context < (needed := self.ngram + self.answer):
            raise UserError(f"context={slice.context}: the n-gram and the answer need {needed} symbols")
        if self.symbols**self.ngram < slice.context:  # then most n-grams would occur several times
            different = f"only {self.symbols**self.ngram} different ones for a context of {slice.context}"
            fits = next(size for size in range(1, 64) if self.symbols**size >= slice.context)
            raise UserError(f"ngram={self.ngram}: {different}, take ngram={fits}")

    def chance(self, slice: LookupSlice) -> float:
        return 1 / self.symbols

    def group_names(self, slice: LookupSlice) -> tuple[str, ...]:
        return tuple(str(place) for place in range(self.answer))

    def spelling(self, token: int) -> str:
        return "|" if token == _SEPARATOR else str(token - _FIRST)

    def sample(self, key: Key[Array, ""], slice: LookupSlice, batch_size: int) -> Batch:
        """Returns a batch with `answer` targets per row."""
        text, place = self._texts(key, slice.context, batch_size)
        found = jnp.take_along_axis(text, place + jnp.arange(self.ngram + self.answer), axis=1)
        ngram, answer = found[:, : self.ngram], found[:, self.ngram :]
        separator = jnp.full((batch_size, 1), _SEPARATOR, jnp.int32)
        parts = [ngram, separator, text, separator] if self.order == "prefix" else [text, separator, ngram]
        return answered(jnp.concatenate(parts, axis=1), answer, groups=jnp.arange(self.answer))

    def _texts(self, key: Key[Array, ""], context: int, b: int) -> tuple[Int[Array, "b s"], Int[Array, "b 1"]]:
        """Returns texts and the place of an n-gram that each has once: both are drawn again where it has more."""

        def redraw(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            text, place, repeated, round = carry
            of_text, of_place = jax.random.split(jax.random.fold_in(key, round))
            new = jax.random.randint(of_text, (b, context), _FIRST, self.vocabulary, jnp.int32)
            at = jax.random.randint(of_place, (b, 1), 0, context - self.ngram - self.answer + 1, jnp.int32)
            text, place = jnp.where(repeated, new, text), jnp.where(repeated, at, place)
            ngram = jnp.take_along_axis(text, place + jnp.arange(self.ngram), axis=1)
            ends = context - self.ngram + 1
            same = jnp.stack([text[:, i : i + ends] == ngram[:, i : i + 1] for i in range(self.ngram)]).all(axis=0)
            return text, place, jnp.sum(same, axis=1, keepdims=True) > 1, round + 1

        none = (jnp.zeros((b, context), jnp.int32), jnp.zeros((b, 1), jnp.int32), jnp.ones((b, 1), bool), jnp.uint32(0))
        text, place, _, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[2]), redraw, none)
        return text, place
