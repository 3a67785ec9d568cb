"""Multi-query associative recall (MQAR).

    tokens   k1 v1 k2 v2 ... kD vD | ...... k2 f ...... k1 f ...        (context, then queries among filler f)
    label                                   v2          v1               at the query's own position

A context of D pairs, then each key once more, on an even position; there the model should predict the key's value,
which the input doesn't repeat. Query j stands at 2 D passes + 2 gap_j, gaps drawn without replacement with p(i) ~ a
i^(a-1) over the (length - 2 D passes) / 2 slots: a = 0.01 puts most queries shortly after the context.

Source: Arora, Eyuboglu et al., Zoology (arXiv 2312.04927), section 4; HazyResearch/zoology, data/multiquery_ar.py.

Easy to get wrong:
- The first drawn gap belongs to the first key, so early keys tend to be asked early.
- The published random filler may repeat a key of the context, followed by something else: a contradiction without a
  label (at vocabulary 256, length 64 and 8 pairs more than one per example). Here filler avoids the example's keys;
  `contradictions=True` gives the published behaviour.
"""

from __future__ import annotations

import math
from typing import Literal

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least, requires
from recollect.data.batch import Batch
from recollect.data.synthetics.contract import example_count
from recollect.data.synthetics.draws import distinct, remaining
from recollect.data.synthetics.task import Slice, SyntheticTask

_positive = requires(lambda value: value > 0 and math.isfinite(value), "must be positive and finite")
_even = requires(lambda n: n >= 2 and n % 2 == 0, "must be even and at least 2, keys stand on even positions")


@chz.chz(typecheck=True)
class RecallSlice(Slice):
    """Examples of one size: `length` tokens with `pairs` key-value pairs."""

    length: int = chz.field(validator=_even)
    pairs: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class MQAR(SyntheticTask):
    """Multi-query associative recall.

    Attributes:
      vocab_size: token ids; 0 is the zero filler, keys are 1 .. V/2 - 1, values V/2 .. V - 1.
      length, pairs: of the one slice, where no others are named.
      power: a of the gaps' distribution p(i) ~ a i^(a-1); 1 is uniform.
      filler: tokens between queries: uniformly drawn, or 0.
      passes: how often the context appears.
      contradictions: random filler may repeat a key of the context, as in the published generator.
    """

    vocab_size: int = chz.field(default=8192, validator=example_count)
    length: int = 64
    pairs: int = 4
    power: float = chz.field(default=0.01, validator=_positive)
    filler: Literal["random", "zero"] = "random"
    passes: int = chz.field(default=1, validator=at_least(1))
    contradictions: bool = False
    extrapolation: tuple[int, ...] = ()

    def check(self, slice: RecallSlice) -> None:
        if self.vocab_size <= slice.length:
            raise UserError(f"vocab_size={self.vocab_size}: must be larger than the length, {slice.length}")
        # Keys can't run out: vocab_size > length >= 4 pairs leaves vocab_size // 2 - 1 >= pairs of them.
        needed = 2 * slice.pairs * self.passes + 2 * slice.pairs
        if needed > slice.length:
            most = slice.length // (2 * self.passes + 2)
            sizes = f"{needed} tokens (2 pairs passes + 2 pairs, passes={self.passes}) and the length is {slice.length}"
            raise UserError(f"pairs={slice.pairs} need {sizes}: at most {most} pairs fit")

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> RecallSlice:
        return RecallSlice(length=self.length, pairs=self.pairs)

    def scaled(self, slice: RecallSlice, factor: int) -> RecallSlice:
        return chz.replace(slice, length=factor * slice.length, pairs=factor * slice.pairs)

    def chance(self, slice: RecallSlice) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)  # a guess among the values

    def sample(self, key: Key[Array, ""], slice: RecallSlice, batch_size: int) -> Batch:
        """Returns a batch whose targets are in the order of the pairs: their positions are not sorted."""
        length, pairs, half = slice.length, slice.pairs, self.vocab_size // 2
        key_of_keys, key_of_values, key_of_gaps, key_of_filler = jax.random.split(key, 4)
        keys = 1 + distinct(key_of_keys, batch_size, half - 1, pairs)
        values = half + distinct(key_of_values, batch_size, self.vocab_size - half, pairs)
        context_length = 2 * pairs * self.passes
        gaps = drawn_gaps(key_of_gaps, batch_size, (length - context_length) // 2, pairs, self.power)
        positions = context_length + 2 * gaps

        context = jnp.tile(jnp.stack([keys, values], axis=-1).reshape(batch_size, 2 * pairs), (1, self.passes))
        tokens = jnp.concatenate([context, self._filler(key_of_filler, keys, length - context_length)], axis=1)
        tokens = tokens.at[jnp.arange(batch_size)[:, None], positions].set(keys, unique_indices=True)
        return Batch(tokens, values, positions, weights=jnp.ones((batch_size, pairs), jnp.float32))

    def _filler(self, key: Key[Array, ""], keys: Int[Array, "b n"], length: int) -> Int[Array, "b t"]:
        b, pairs = keys.shape
        if self.filler == "zero":
            return jnp.zeros((b, length), jnp.int32)
        if self.contradictions:
            return jax.random.randint(key, (b, length), 0, self.vocab_size, jnp.int32)
        rank = jax.random.randint(key, (b, length), 0, self.vocab_size - pairs, jnp.int32)
        return remaining(rank, jnp.sort(keys, axis=1))


def drawn_gaps(key: Key[Array, ""], batch_size: int, space: int, count: int, power: float) -> Int[Array, "b n"]:
    """Returns `count` slots of 0 .. space - 1 per row, drawn in turn without replacement, p(i) ~ (i+1)^(power-1)."""
    # Top-k of log p + Gumbel noise gives the slots in the order in which successive draws give them.
    log_weight = (power - 1) * np.log(np.arange(1, space + 1))
    noise = jax.random.gumbel(key, (batch_size, space)) + jnp.asarray(log_weight, jnp.float32)
    return jax.lax.top_k(noise, count)[1].astype(jnp.int32)
