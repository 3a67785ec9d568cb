"""Phonebook: names and their numbers, some of them again as examples; then the number of another one.

    tokens   a b : 7 0   c d : 9 4   e f : 6 1 ...   c d : 9 4   e f : 6
    label                                                      6 1

A name is several tokens, all names of a book differ; a number is digits, the first of which is 6 to 9. Accuracy is
reported by where in the book the answer stands.

Source: Jelassi et al., Repeat After Me (arXiv 2402.01032), with tokens for names.
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
from recollect.data.synthetics.needles import DEPTHS, digits
from recollect.data.synthetics.task import Slice, SyntheticTask

_COLON, _DIGIT = 0, 1
_FIRST = _DIGIT + 10


@chz.chz(typecheck=True)
class PhonebookSlice(Slice):
    """Books of `entries` names."""

    entries: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class Phonebook(SyntheticTask):
    """The number of a name.

    Attributes:
      entries: names in the book.
      examples: entries that are repeated before the question.
      name_tokens, words: tokens of a name, each one of `words`.
      digits: of a number.
    """

    entries: int = 16
    examples: int = chz.field(default=2, validator=at_least(0))
    name_tokens: int = chz.field(default=2, validator=at_least(1))
    words: int = chz.field(default=512, validator=at_least(1))
    digits: int = chz.field(default=10, validator=at_least(1))

    metric = "exact"
    breakdown = "depth"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.words

    def slice(self) -> PhonebookSlice:
        return PhonebookSlice(length=self._length(self.entries), entries=self.entries)

    def scaled(self, slice: PhonebookSlice, factor: int) -> PhonebookSlice:
        return PhonebookSlice(length=self._length(factor * slice.entries), entries=factor * slice.entries)

    def _length(self, entries: int) -> int:
        return (entries + self.examples + 1) * (self.name_tokens + 1 + self.digits) - 1

    def check(self, slice: PhonebookSlice) -> None:
        names = self.words**self.name_tokens
        if names >= 2**31:
            raise UserError(f"name_tokens={self.name_tokens}: {self.words} ** name_tokens names must be below 2**31")
        if slice.length != (length := self._length(slice.entries)):
            raise UserError(f"length={slice.length}: a book of {slice.entries} entries takes {length} tokens")
        if slice.entries <= self.examples:
            raise UserError(f"entries={slice.entries}: with examples={self.examples} take at least {self.examples + 1}")
        if slice.entries > names:
            raise UserError(f"words={self.words}: only {names} names for {slice.entries} entries, raise words")

    def chance(self, slice: PhonebookSlice) -> float:
        return 10.0 ** (1 - self.digits) / 4

    def group_names(self, slice: PhonebookSlice) -> tuple[str, ...]:
        return tuple(f"{100 * depth // DEPTHS}%" for depth in range(DEPTHS))

    def spelling(self, token: int) -> str:
        return ":" if token == _COLON else str(token - _DIGIT) if token < _FIRST else f"n{token - _FIRST}"

    def sample(self, key: Key[Array, ""], slice: PhonebookSlice, batch_size: int) -> Batch:
        """Returns a batch with `digits` targets per row."""
        b, entries = batch_size, slice.entries
        of_names, of_first, of_others, of_asked = jax.random.split(key, 4)
        names = digits(distinct(of_names, b, self.words**self.name_tokens, entries), self.words, self.name_tokens)
        first = jax.random.randint(of_first, (b, entries, 1), 6, 10, jnp.int32)
        others = jax.random.randint(of_others, (b, entries, self.digits - 1), 0, 10, jnp.int32)
        colon = jnp.full((b, entries, 1), _COLON, jnp.int32)
        book = jnp.concatenate([_FIRST + names, colon, _DIGIT + first, _DIGIT + others], axis=2)
        asked = distinct(of_asked, b, entries, self.examples + 1)
        lines = jnp.concatenate([book, jnp.take_along_axis(book, asked[:, :, None], axis=1)], axis=1).reshape(b, -1)
        prompt, number = lines[:, : -self.digits], lines[:, -self.digits :]
        return answered(prompt, number, groups=asked[:, -1:] * DEPTHS // entries)
