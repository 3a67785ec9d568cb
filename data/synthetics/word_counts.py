"""Common and frequent words (RULER): which words appear most often in a shuffled list?

    tokens   w1 w3 w2 w1 w4 w1 w3 w5 ... ASK w1
    label                                w1  w3

Common words appear `often` times and the others `seldom`; the answer is in order of first appearance. Frequencies of
frequent words follow a zeta law; the most frequent word is noise (token 0), the answer the next ones by frequency.

Source: Hsieh et al., RULER (arXiv 2404.06654), section 3 (aggregation). The list is not numbered and no example
precedes it; a word is one token.
"""

from __future__ import annotations

import math

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least, requires
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_NOISE, _ASK, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class CommonWords(SyntheticTask):
    """The words that appear `often` times among those that appear `seldom` times.

    Attributes:
      answers: number of common words.
      often, seldom: times that a common word and another one appear; RULER has 30 and 3, below 4k tokens 6 and 1.
      words: token ids of words.
    """

    length: int = 128
    answers: int = chz.field(default=10, validator=at_least(1))
    often: int = chz.field(default=6, validator=at_least(2))
    seldom: int = chz.field(default=1, validator=at_least(1))
    words: int = chz.field(default=2000, validator=at_least(1))

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.words

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if self.seldom >= self.often:
            raise UserError(f"seldom={self.seldom}: must be below often={self.often}")
        least = self.answers * (self.often + 1) + self.seldom
        if slice.length < least:
            raise UserError(f"length={slice.length}: the common words, another and the question need {least} tokens")
        if (different := len(self._counts(slice)) - 1) > self.words:
            raise UserError(f"words={self.words}: a list of {slice.length} tokens has {different} different ones")

    def chance(self, slice: Slice) -> float:
        """Returns the share right of guesses among the words of the list."""
        return 1 / (len(self._counts(slice)) - 1)

    def _counts(self, slice: Slice) -> list[int]:
        """Returns how often noise, which fills what words leave over, and each word appear."""
        others, left = divmod(slice.length - self.answers * (self.often + 1), self.seldom)
        return [left, *[self.often] * self.answers, *[self.seldom] * others]

    def spelling(self, token: int) -> str:
        return _spelling(token)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with `answers` targets per row."""
        prompt, words = _shuffled(key, self._counts(slice), self.words, batch_size)
        common = words[:, 1 : 1 + self.answers]
        places = jnp.arange(prompt.shape[1])[:, None]
        first = jnp.min(jnp.where(prompt[:, :, None] == common[:, None, :], places, slice.length), axis=1)
        return answered(prompt, jnp.take_along_axis(common, jnp.argsort(first, axis=1), axis=1))


@chz.chz(typecheck=True)
class FrequentWords(SyntheticTask):
    """The most frequent words after the noise, where frequencies follow a zeta law.

    Attributes:
      answers: number of words asked: ranks 2 to answers + 1.
      alpha: the word of rank k is drawn with probability in proportion to k ** -alpha; counts are its expectations.
      words: token ids of words.
    """

    length: int = 128
    answers: int = chz.field(default=3, validator=at_least(1))
    alpha: float = chz.field(
        default=2.0, validator=requires(lambda alpha: 0 < alpha < math.inf, "must be positive and finite")
    )
    words: int = chz.field(default=2000, validator=at_least(1))

    breakdown = "rank"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.words

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if self.words < self.answers + 1:
            raise UserError(f"words={self.words}: must be more than answers={self.answers}")
        if not self._distinguishes(slice):
            longer = (chz.replace(slice, length=slice.length << times) for times in range(1, 24))
            fits = next((part.length for part in longer if self._distinguishes(part)), None)
            advice = f"{fits} tokens do" if fits else "take a smaller alpha or fewer answers"
            raise UserError(
                f"length={slice.length}: ranks 2 to {self.answers + 1} must differ in their counts; {advice}"
            )

    def _distinguishes(self, slice: Slice) -> bool:
        ranked = [*self._counts(slice)[1 : self.answers + 2], 0]
        return len(ranked) > self.answers and all(np.diff(ranked[: self.answers + 1]) < 0)

    def chance(self, slice: Slice) -> float:
        """Returns the share right of guesses among the words of the list."""
        return 1 / (len(self._counts(slice)) - 1)

    def group_names(self, slice: Slice) -> tuple[str, ...]:
        return tuple(str(rank) for rank in range(2, self.answers + 2))

    def _counts(self, slice: Slice) -> list[int]:
        """Returns how often noise, which fills what rounding leaves over, and each word appear, by rank."""
        slots = slice.length - self.answers
        share = np.arange(1, self.words + 2, dtype=np.float64) ** -self.alpha
        counts = np.floor(max(slots, 0) * share / share.sum()).astype(int)
        counts = counts[1:][counts[1:] > 0].tolist()
        return [slots - sum(counts), *counts]

    def spelling(self, token: int) -> str:
        return _spelling(token)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with `answers` targets per row, the most frequent first."""
        prompt, words = _shuffled(key, self._counts(slice), self.words, batch_size)
        return answered(prompt, words[:, 1 : 1 + self.answers], groups=jnp.arange(self.answers))


def _spelling(token: int) -> str:
    return f"w{token - _FIRST}" if token >= _FIRST else (".", "ASK")[token]


def _shuffled(
    key: Key[Array, ""], counts: list[int], words: int, batch_size: int
) -> tuple[Int[Array, "b t"], Int[Array, "b n"]]:
    """Returns a list in which each number i appears counts[i] times, in random order and with the question behind it,
    and the token of each number: 0 is noise, the others different words."""
    of_words, of_order = jax.random.split(key)
    tokens = _FIRST + distinct(of_words, batch_size, words, len(counts) - 1)
    tokens = jnp.concatenate([jnp.full((batch_size, 1), _NOISE, jnp.int32), tokens], axis=1)
    numbers = jnp.asarray(np.repeat(np.arange(len(counts)), counts))
    order = shuffled(of_order, batch_size, len(numbers))
    listed = jnp.take_along_axis(tokens, numbers[order], axis=1)
    return jnp.pad(listed, ((0, 0), (0, 1)), constant_values=_ASK), tokens
