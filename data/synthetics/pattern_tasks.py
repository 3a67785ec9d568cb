"""Tasks for patterns of attention other than causal self attention, for which there is MQAR.

    MaskedRecall    tokens  k2 v2 k1 ?  k1 v1 k2 ?   noncausal self: a hidden value was shown before, or will be later
                    label            v1          v2
    SourceRecall    source  k1 v1 k2 v2 k3 v3        noncausal cross: all queries are there at once
                    tokens  k3 k1 k2
                    label   v3 v1 v2
    SourceCopying   source  a b c                    causal cross: no output depends on a later token
                    tokens  | c b                    (order="reversed")
                    label   c b a

Models of the cross patterns are encoder-decoders (`LanguageModel.encoder`). Such small tasks stand for what CAB (Zhang
et al. 2023, arXiv 2210.07661) measures at length: masked language models, point clouds, summaries.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

_HIDDEN = 0
_SEPARATOR = 0


@chz.chz(typecheck=True)
class PairSlice(Slice):
    """Examples with `pairs` key-value pairs, as long as these need."""

    pairs: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class _PairRecall(SyntheticTask):
    """Base of recall of `pairs` pairs of a key and a value.

    Attributes:
      vocab_size: token ids; 0 hides a value, keys are 1 .. V/2 - 1, values V/2 .. V - 1.
      pairs: different keys, with different values.
    """

    vocab_size: int = 64
    pairs: int = chz.field(default=8, validator=at_least(1))

    tokens_per_pair: ClassVar[int]

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> PairSlice:
        return self._sized(self.pairs)

    def _sized(self, pairs: int) -> PairSlice:
        return PairSlice(length=self.tokens_per_pair * pairs, pairs=pairs)

    def scaled(self, slice: PairSlice, factor: int) -> PairSlice:
        """Returns the slice of `factor` times as many pairs."""
        return chz.replace(self._sized(factor * slice.pairs), weight=slice.weight)

    def check(self, slice: PairSlice) -> None:
        if self.vocab_size // 2 - 1 < slice.pairs:
            raise UserError(f"vocab_size={self.vocab_size}: {slice.pairs} pairs need at least {2 * slice.pairs + 2}")
        if slice.length != (length := self.tokens_per_pair * slice.pairs):
            raise UserError(f"length={slice.length}: {slice.pairs} pairs take {length} tokens")

    def chance(self, slice: PairSlice) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def _pairs(self, key: Key[Array, ""], b: int, count: int) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
        of_keys, of_values = jax.random.split(key)
        half = self.vocab_size // 2
        return 1 + distinct(of_keys, b, half - 1, count), half + distinct(of_values, b, self.vocab_size - half, count)


@chz.chz(typecheck=True)
class MaskedRecall(_PairRecall):
    """Every pair twice, in two orders, with the value hidden in one of them: it is to be predicted."""

    tokens_per_pair = 4
    pattern = "noncausal self"
    extrapolation: tuple[int, ...] = (2,)

    def sample(self, key: Key[Array, ""], slice: PairSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per pair, in the order of the pairs: their positions are not sorted."""
        b, pairs = batch_size, slice.pairs
        of_pairs, of_first, of_second, of_hidden = jax.random.split(key, 4)
        keys, values = self._pairs(of_pairs, b, pairs)
        # places[:, i] is where pair i stands among the pairs of each half.
        places = jnp.stack([shuffled(of_first, b, pairs), pairs + shuffled(of_second, b, pairs)], axis=2)
        hidden = jax.random.bernoulli(of_hidden, shape=(b, pairs)).astype(jnp.int32)
        shown = jnp.where(hidden[:, :, None] == jnp.arange(2), _HIDDEN, values[:, :, None])
        both = jnp.stack([jnp.broadcast_to(keys[:, :, None], places.shape), shown], axis=3)
        tokens = jnp.zeros((b, 2 * pairs, 2), jnp.int32).at[jnp.arange(b)[:, None, None], places].set(both)
        positions = 2 * jnp.take_along_axis(places, hidden[:, :, None], axis=2)[:, :, 0] + 1
        return Batch(tokens.reshape(b, 4 * pairs), values, positions, jnp.ones((b, pairs), jnp.float32))


@chz.chz(typecheck=True)
class SourceRecall(_PairRecall):
    """Pairs in the source; the tokens are their keys in another order, each with its value as its label."""

    tokens_per_pair = 1
    pattern = "noncausal cross"
    extrapolation: tuple[int, ...] = (2,)

    def sample(self, key: Key[Array, ""], slice: PairSlice, batch_size: int) -> Batch:
        """Returns a batch with a target per token, and a source of two tokens per pair."""
        of_pairs, of_order = jax.random.split(key)
        keys, values = self._pairs(of_pairs, batch_size, slice.pairs)
        source = jnp.stack([keys, values], axis=2).reshape(batch_size, 2 * slice.pairs)
        order = shuffled(of_order, batch_size, slice.pairs)
        tokens, targets = (jnp.take_along_axis(each, order, axis=1) for each in (keys, values))
        positions = jnp.broadcast_to(jnp.arange(slice.pairs, dtype=jnp.int32), tokens.shape)
        return Batch(tokens, targets, positions, jnp.ones(tokens.shape, jnp.float32), source=source)


@chz.chz(typecheck=True)
class SourceCopying(SyntheticTask):
    """The source once more: after a separator each token's label is the next symbol of the copy.

    Attributes:
      symbols: how many there are to draw from.
      length: symbols of the source, and tokens.
      order: "forward", or "reversed": the last symbol first.
    """

    symbols: int = chz.field(default=26, validator=at_least(2))
    length: int = chz.field(default=16, validator=at_least(1))
    order: Literal["forward", "reversed"] = "reversed"
    extrapolation: tuple[int, ...] = (2,)

    pattern = "causal cross"

    @property
    def vocabulary(self) -> int:
        return 1 + self.symbols

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def chance(self, slice: Slice) -> float:
        return 1 / self.symbols

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with a target per token, and a source of as many tokens."""
        source = jax.random.randint(key, (batch_size, slice.length), 1, self.vocabulary, jnp.int32)
        copy = source[:, ::-1] if self.order == "reversed" else source
        tokens = jnp.pad(copy[:, :-1], ((0, 0), (1, 0)), constant_values=_SEPARATOR)
        positions = jnp.broadcast_to(jnp.arange(slice.length, dtype=jnp.int32), tokens.shape)
        return Batch(tokens, copy, positions, jnp.ones(tokens.shape, jnp.float32), source=source)
