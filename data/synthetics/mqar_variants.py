"""Variants of MQAR: updated keys, compound keys, keys asked before the context, noisy keys.

    ForgettingMQAR      k1 v1 k2 v2 k1 v3 | . k2 . k1            the last value counts: v2, v3
    CompositionalMQAR   a x v1  b x v2  a y v3  b y v4 | . a y   neither token alone decides: v3
    AskedFirstMQAR      k2 k4 | k1 v1 k2 v2 k3 v3 k4 v4 | . k4   only k2 and k4 are asked
    NoisyMQAR           a b c v1  d e f v2 | . d x f             the nearest key: v2

All keep MQAR's fields and laws: `passes` repeats the context, queries stand at gaps of its power law, each followed by
a token at least, and the filler avoids the tokens of the example's keys.

Sources: HazyResearch/zoology, forgetting_mqar.py and compositional_ar.py; Arora et al., Just Read Twice (arXiv
2407.05483), for two passes and for questions before the context.
"""

from __future__ import annotations

import abc
import math
from typing import NamedTuple

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least, requires
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct, remaining
from recollect.data.synthetics.mqar import MQAR, RecallSlice, drawn_gaps
from recollect.data.synthetics.orders import shuffled

_share = requires(lambda share: 0 < share <= 1, "must be above 0 and at most 1")


class Layout(NamedTuple):
    """Tokens before the context, of one pass of it, queries and tokens of each; ids that suffice."""

    before: int
    context: int
    queries: int
    size: int
    ids: int


class Facts(NamedTuple):
    """What examples say and ask: tokens before the context, one pass of it, queries, their answers, tokens of keys."""

    before: Int[Array, "b f"]
    context: Int[Array, "b c"]
    queries: Int[Array, "b n k"]
    answers: Int[Array, "b n"]
    keys: Int[Array, "b m"]


@chz.chz(typecheck=True)
class MQARVariant(MQAR):
    """Base of the variants, which state a layout and draw facts."""

    extrapolation: tuple[int, ...] = (2, 4, 8)

    @abc.abstractmethod
    def layout(self, slice: RecallSlice) -> Layout:
        """Returns the sizes of an example."""

    @abc.abstractmethod
    def facts(self, key: Key[Array, ""], slice: RecallSlice, b: int) -> Facts:
        """Returns the facts of `b` examples."""

    def check(self, slice: RecallSlice) -> None:
        sizes = self.layout(slice)
        needed = sizes.before + self.passes * sizes.context + sizes.queries * (sizes.size + 1)
        if needed > slice.length:
            raise UserError(f"length={slice.length}: pairs={slice.pairs} need {needed} tokens, passes={self.passes}")
        if self.vocab_size < sizes.ids:
            raise UserError(f"vocab_size={self.vocab_size}: pairs={slice.pairs} need at least {sizes.ids} ids")

    def sample(self, key: Key[Array, ""], slice: RecallSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per query, whose positions are not sorted."""
        sizes = self.layout(slice)
        of_facts, of_gaps, of_filler = jax.random.split(key, 3)
        facts = self.facts(of_facts, slice, batch_size)
        said = jnp.concatenate([facts.before, jnp.tile(facts.context, (1, self.passes))], axis=1)
        start, each = said.shape[1], sizes.size + 1
        gaps = drawn_gaps(of_gaps, batch_size, (slice.length - start) // each, sizes.queries, self.power)
        places = start + each * gaps[:, :, None] + jnp.arange(sizes.size, dtype=jnp.int32)
        tokens = jnp.concatenate([said, self._filler(of_filler, facts.keys, slice.length - start)], axis=1)
        rows = jnp.arange(batch_size)[:, None, None]
        tokens = tokens.at[rows, places].set(facts.queries, unique_indices=True)
        return Batch(tokens, facts.answers, places[:, :, -1], jnp.ones(facts.answers.shape, jnp.float32))

    def _pairs(self, key: Key[Array, ""], b: int, keys: int, values: int) -> tuple[Array, Array]:
        """Returns different keys and different values, as MQAR's."""
        of_keys, of_values = jax.random.split(key)
        half = self.vocab_size // 2
        return 1 + distinct(of_keys, b, half - 1, keys), half + distinct(of_values, b, self.vocab_size - half, values)


@chz.chz(typecheck=True)
class ForgettingMQAR(MQARVariant):
    """MQAR in which some keys get another value after all pairs: the last one is asked.

    Attributes:
      updated: share of the keys that get another value.
    """

    updated: float = chz.field(default=0.5, validator=_share)

    def _updates(self, slice: RecallSlice) -> int:
        return max(1, round(self.updated * slice.pairs))

    def layout(self, slice: RecallSlice) -> Layout:
        return Layout(0, 2 * (slice.pairs + self._updates(slice)), slice.pairs, 1, 2 * slice.pairs + 4)

    def facts(self, key: Key[Array, ""], slice: RecallSlice, b: int) -> Facts:
        of_pairs, of_updates, of_values = jax.random.split(key, 3)
        keys, values = self._pairs(of_pairs, b, slice.pairs, slice.pairs)
        which = distinct(of_updates, b, slice.pairs, self._updates(slice))
        half, choices = self.vocab_size // 2, self.vocab_size - self.vocab_size // 2
        steps = jax.random.randint(of_values, which.shape, 1, choices, jnp.int32)
        new = half + (jnp.take_along_axis(values, which, axis=1) - half + steps) % choices
        said = jnp.concatenate([keys, jnp.take_along_axis(keys, which, axis=1)], axis=1)
        context = jnp.stack([said, jnp.concatenate([values, new], axis=1)], axis=2).reshape(b, -1)
        answers = values.at[jnp.arange(b)[:, None], which].set(new, unique_indices=True)
        return Facts(keys[:, :0], context, keys[:, :, None], answers, keys)


@chz.chz(typecheck=True)
class CompositionalMQAR(MQARVariant):
    """MQAR with keys of two tokens, all pairs of a few first and second ones: both are needed.

    The ids are in thirds: first tokens of keys, second ones, values; `pairs` is a square number.
    """

    def layout(self, slice: RecallSlice) -> Layout:
        ids = 3 * max(slice.pairs, math.isqrt(slice.pairs) + 1)
        return Layout(0, 3 * slice.pairs, slice.pairs, 2, ids)

    def scaled(self, slice: RecallSlice, factor: int) -> RecallSlice:
        """Returns the slice `factor` times as long, with the largest square number of pairs up to as many more."""
        pairs = math.isqrt(factor * slice.pairs) ** 2
        return chz.replace(slice, length=factor * slice.length, pairs=pairs)

    def check(self, slice: RecallSlice) -> None:
        side = math.isqrt(slice.pairs)
        if side**2 != slice.pairs:
            raise UserError(f"pairs={slice.pairs}: must be a square number, {side**2} or {(side + 1) ** 2}")
        super().check(slice)

    def chance(self, slice: RecallSlice) -> float:
        return 1 / (self.vocab_size - 2 * (self.vocab_size // 3))

    def facts(self, key: Key[Array, ""], slice: RecallSlice, b: int) -> Facts:
        of_first, of_second, of_order, of_values = jax.random.split(key, 4)
        third, side = self.vocab_size // 3, math.isqrt(slice.pairs)
        first = 1 + distinct(of_first, b, third - 1, side)
        second = third + distinct(of_second, b, third, side)
        values = 2 * third + distinct(of_values, b, self.vocab_size - 2 * third, slice.pairs)
        order = shuffled(of_order, b, slice.pairs)
        parts = (first, order // side), (second, order % side)
        queries = jnp.stack([jnp.take_along_axis(tokens, index, axis=1) for tokens, index in parts], axis=2)
        context = jnp.concatenate([queries, values[:, :, None]], axis=2).reshape(b, -1)
        return Facts(first[:, :0], context, queries, values, jnp.concatenate([first, second], axis=1))


@chz.chz(typecheck=True)
class AskedFirstMQAR(MQARVariant):
    """MQAR in which only some keys are asked, and named before the context.

    Attributes:
      asked: share of the keys that are asked.
      before: whether they are also named before the context; without, what a model can't know must all be kept.
    """

    asked: float = chz.field(default=0.25, validator=_share)
    before: bool = True

    def _asked(self, slice: RecallSlice) -> int:
        return max(1, round(self.asked * slice.pairs))

    def layout(self, slice: RecallSlice) -> Layout:
        asked = self._asked(slice)
        return Layout(self.before * asked, 2 * slice.pairs, asked, 1, 2 * slice.pairs + 2)

    def facts(self, key: Key[Array, ""], slice: RecallSlice, b: int) -> Facts:
        of_pairs, of_asked = jax.random.split(key)
        keys, values = self._pairs(of_pairs, b, slice.pairs, slice.pairs)
        which = distinct(of_asked, b, slice.pairs, self._asked(slice))
        queries, answers = (jnp.take_along_axis(tokens, which, axis=1) for tokens in (keys, values))
        context = jnp.stack([keys, values], axis=2).reshape(b, -1)
        return Facts(queries if self.before else queries[:, :0], context, queries[:, :, None], answers, keys)


@chz.chz(typecheck=True)
class NoisyMQAR(MQARVariant):
    """MQAR with keys of several tokens, some of which are others in the query: the nearest key is meant.

    Attributes:
      key_tokens: tokens of a key; no two keys of an example share one.
      replaced: how many of them the query replaces by tokens of no key.
    """

    key_tokens: int = chz.field(default=3, validator=at_least(1))
    replaced: int = chz.field(default=1, validator=at_least(0))

    def layout(self, slice: RecallSlice) -> Layout:
        size = self.key_tokens
        return Layout(0, (size + 1) * slice.pairs, slice.pairs, size, 2 * size * slice.pairs + 4)

    def check(self, slice: RecallSlice) -> None:
        if self.replaced >= self.key_tokens:
            raise UserError(f"replaced={self.replaced}: must be below key_tokens={self.key_tokens}, some must stay")
        super().check(slice)

    def facts(self, key: Key[Array, ""], slice: RecallSlice, b: int) -> Facts:
        of_pairs, of_noise, of_places = jax.random.split(key, 3)
        size, half = self.key_tokens, self.vocab_size // 2
        keys, values = self._pairs(of_pairs, b, size * slice.pairs, slice.pairs)
        rank = jax.random.randint(of_noise, keys.shape, 0, half - 1 - size * slice.pairs, jnp.int32)
        others = 1 + remaining(rank, jnp.sort(keys - 1, axis=1))
        is_replaced = shuffled(of_places, b * slice.pairs, size).reshape(b, -1) < self.replaced
        queries = jnp.where(is_replaced, others, keys).reshape(b, slice.pairs, size)
        context = jnp.concatenate([keys.reshape(queries.shape), values[:, :, None]], axis=2).reshape(b, -1)
        return Facts(keys[:, :0], context, queries, values, keys)
