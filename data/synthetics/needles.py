"""Needles in a haystack: facts hidden in filler, and one question or several at the end.

    tokens   . . . KEY k v1 v2 . . . . KEY k' v1' v2' . . ASK k v1
    label                                                     v1 v2

A needle is a mark, a key and a value, of several tokens each; the haystack is a repeated cycle of 32 tokens, random
words, or other needles. A key with several values is answered by all, in their order; several keys are asked one after
the other. Needles lie anywhere with equal probability; accuracy is reported by the depth of the needle that answers.

Sources: passkey, Mohtashami and Jaggi (arXiv 2305.16300), section 4.2; RULER, Hsieh et al. (arXiv 2404.06654), appendix
B, whose seven retrieval tasks are settings of this one (`ruler`). In this closed vocabulary a needle's sentence is one
mark; the passkey is stated once, where the original repeats it.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

CYCLE = 32
DEPTHS = 10
_KEY, _ASK, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class Needles(SyntheticTask):
    """Retrieval of values by their keys from a long context.

    Attributes:
      haystack: what surrounds the needles: "cycle", the same 32 tokens again and again; "random", words drawn from
        `fillers`; "needles", as many of other keys as fit.
      keys: keys in the context; a haystack of needles has as many as fit.
      values: needles per key.
      queries: keys that are asked.
      key_tokens, words: tokens of a key, each one of `words`.
      value_tokens, symbols: tokens of a value, each one of `symbols`.
    """

    length: int = 128
    haystack: Literal["cycle", "random", "needles"] = "random"
    keys: int = chz.field(default=1, validator=at_least(1))
    values: int = chz.field(default=1, validator=at_least(1))
    queries: int = chz.field(default=1, validator=at_least(1))
    key_tokens: int = chz.field(default=1, validator=at_least(1))
    words: int = chz.field(default=1000, validator=at_least(1))
    value_tokens: int = chz.field(default=7, validator=at_least(1))
    symbols: int = chz.field(default=10, validator=at_least(2))
    fillers: int = chz.field(default=1000, validator=at_least(1))

    metric = "exact"
    breakdown = "depth"

    @property
    def vocabulary(self) -> int:
        fillers = {"cycle": CYCLE, "random": self.fillers, "needles": 1}[self.haystack]
        return _FIRST + self.symbols + self.words + fillers

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        choices = self.words**self.key_tokens
        if choices >= 2**31:
            raise UserError(f"key_tokens={self.key_tokens}: {self.words} ** key_tokens keys must be fewer than 2**31")
        keys, space = self._keys(slice), self._context(slice)
        needed = max(keys, self.queries) * self.values * self._needle
        if space < needed:
            fits = slice.length - space + needed
            raise UserError(f"length={slice.length}: the needles and questions need {fits} tokens")
        if self.queries > keys:
            raise UserError(f"queries={self.queries}: there are keys={keys} to ask, raise keys to {self.queries}")
        if keys > choices:
            raise UserError(f"words={self.words}: only {choices} keys, {keys} are needed: raise words or key_tokens")

    def chance(self, slice: Slice) -> float:
        return self.symbols ** -float(self.queries * self.values * self.value_tokens)

    def group_names(self, slice: Slice) -> tuple[str, ...]:
        return tuple(f"{100 * depth // DEPTHS}%" for depth in range(DEPTHS))

    def spelling(self, token: int) -> str:
        digit, word = token - _FIRST, token - _FIRST - self.symbols
        if digit < 0:
            return ("KEY", "ASK")[token]
        return f"{digit:x}" if word < 0 else f"w{word}" if word < self.words else "."

    @property
    def _needle(self) -> int:
        return 1 + self.key_tokens + self.value_tokens

    def _context(self, slice: Slice) -> int:
        """Tokens before the first question."""
        return slice.length + 1 - self.queries * (1 + self.key_tokens + self.values * self.value_tokens)

    def _keys(self, slice: Slice) -> int:
        fit = self._context(slice) // (self.values * self._needle)
        return max(fit, 0) if self.haystack == "needles" else self.keys

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with queries x values x value_tokens targets per row."""
        b, space, keys = batch_size, self._context(slice), self._keys(slice)
        needles, size = keys * self.values, self._needle
        of_keys, of_values, of_places, of_owners, of_filler = jax.random.split(key, 5)
        names = (
            _FIRST
            + self.symbols
            + digits(distinct(of_keys, b, self.words**self.key_tokens, keys), self.words, self.key_tokens)
        )
        values = _FIRST + jax.random.randint(of_values, (b, needles, self.value_tokens), 0, self.symbols, jnp.int32)
        # Every arrangement of needles and single tokens of filler is equally likely; so is every order of the keys.
        slots = jnp.sort(distinct(of_places, b, space - needles * (size - 1), needles), axis=1)
        starts = slots + jnp.arange(needles) * (size - 1)
        owners = shuffled(of_owners, b, needles) // self.values
        mark = jnp.full((b, needles, 1), _KEY, jnp.int32)
        named = jnp.take_along_axis(names, owners[:, :, None], axis=1)
        written = jnp.concatenate([mark, named, values], axis=2)
        places = starts[:, :, None] + jnp.arange(size)
        rows = jnp.arange(b)[:, None, None]
        context = self._filler(of_filler, b, space).at[rows, places].set(written, unique_indices=True)

        # The keys asked are numbers 0 .. queries - 1; a stable sort keeps their needles in order.
        asked = jnp.arange(self.queries)
        which = jnp.argsort(owners[:, None, :] != asked[:, None], axis=2, stable=True)[:, :, : self.values]
        answers = values[jnp.arange(b)[:, None, None], which].reshape(b, self.queries, -1)
        depths = jnp.take_along_axis(starts[:, None, :] * DEPTHS // space, which, axis=2)
        depths = jnp.repeat(depths, self.value_tokens, axis=2).reshape(b, -1)
        ask = jnp.full((b, self.queries, 1), _ASK, jnp.int32)
        questions = jnp.concatenate([ask, names[:, : self.queries], answers], axis=2)
        tokens = jnp.concatenate([context, questions.reshape(b, -1)[:, :-1]], axis=1)
        each = questions.shape[2]
        first = space + asked[:, None] * each + self.key_tokens
        positions = (first + jnp.arange(answers.shape[2])).reshape(1, -1)
        targets = answers.reshape(b, -1)
        weights = jnp.ones(targets.shape, jnp.float32)
        return Batch(tokens, targets, jnp.broadcast_to(positions, targets.shape), weights, groups=depths)

    def _filler(self, key: Key[Array, ""], batch_size: int, space: int) -> Int[Array, "b t"]:
        first = _FIRST + self.symbols + self.words
        if self.haystack == "random":
            return jax.random.randint(key, (batch_size, space), first, first + self.fillers, jnp.int32)
        cycle = CYCLE if self.haystack == "cycle" else 1
        return jnp.broadcast_to(first + jnp.arange(space, dtype=jnp.int32) % cycle, (batch_size, space))


def digits(numbers: Int[Array, "b n"], base: int, count: int) -> Int[Array, "b n k"]:
    """Returns `count` digits of each number, the highest first."""
    return numbers[:, :, None] // base ** jnp.arange(count, dtype=jnp.int32)[::-1] % base
