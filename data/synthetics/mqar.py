"""Multi-query associative recall (MQAR).

    tokens   k1 v1 k2 v2 ... kD vD | ...... k2 f ...... k1 f ...        (context, then queries among filler f)
    label                                   v2          v1               at the query's own position

A context of D pairs, then each key once more, on an even position; there the model should predict the key's value,
which the input doesn't repeat. Query j stands at 2 D passes + 2 gap_j, gaps drawn without replacement with p(i) ~ a
i^(a-1) over the (length - 2 D passes) / 2 slots: a = 0.01 puts most queries shortly after the context.

Source: Arora, Eyuboglu et al., Zoology (arXiv 2312.04927), section 4 and appendix; its generator, HazyResearch/zoology,
`zoology/data/multiquery_ar.py`.

Easy to get wrong:
- The value of a key is not in the input after the query: its place holds filler. A model that copies the next token
  fails.
- The first drawn gap belongs to the first key, so early keys tend to be asked early.
- The published random filler may repeat a key of the context, followed by something else: a contradiction without a
  label (at vocabulary 256, length 64 and 8 pairs more than one per example). Here filler avoids the example's keys;
  `contradictions=True` gives the published behaviour.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from recollect.configuration import Config, UserError, at_least, requires
from recollect.data.batch import Batch, DataConfig

_TRAIN, _EVALUATION = 0x6D716100, 0x6D716101
"""Folded into the seed: two streams independent of each other, and of parameters and dropout of the same seed."""

_positive = requires(lambda value: value > 0 and math.isfinite(value), "must be positive and finite")
_even = requires(lambda n: n >= 2 and n % 2 == 0, "must be even and at least 2, keys stand on even positions")
_counts = requires(lambda n: 1 <= n < 2**31, f"must be at least 1 and below {2**31}")

Number = int | jax.Array


@chz.chz(typecheck=True)
class RecallSlice(Config):
    """Examples of one size: `length` tokens with `pairs` key-value pairs, and `weight`, its share of training calls."""

    length: int = chz.field(validator=_even)
    pairs: int = chz.field(validator=at_least(1))
    weight: float = chz.field(default=1.0, validator=_positive)

    @property
    def name(self) -> str:
        """Name in metrics and tables: LENGTHxPAIRS."""
        return f"{self.length}x{self.pairs}"


@chz.chz(typecheck=True)
class MQAR(DataConfig):
    """Multi-query associative recall, made on the device.

        task = MQAR(vocab_size=256, length=64, pairs=8)
        batch = task.train_batch(seed=0, step=0, batch_size=4)

    Attributes:
      vocab_size: token ids; 0 is the zero filler, keys are 1 .. V/2 - 1, values V/2 .. V - 1.
      length, pairs: the one slice that is trained and evaluated where `mixture` and `evaluation` are empty.
      power: a of the gaps' distribution p(i) ~ a i^(a-1); 1 is uniform.
      filler: tokens between queries: uniformly drawn, or 0.
      passes: how often the context appears.
      contradictions: random filler may repeat a key of the context, as in the published generator.
      mixture: training slices; each device call draws one by weight.
      evaluation: evaluation slices; empty for the training slices.
      evaluation_examples: examples per slice.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = chz.field(default=0.01, validator=_positive)
    filler: Literal["random", "zero"] = "random"
    passes: int = chz.field(default=1, validator=at_least(1))
    contradictions: bool = False
    mixture: tuple[RecallSlice, ...] = ()
    evaluation: tuple[RecallSlice, ...] = ()
    evaluation_examples: int = chz.field(default=1000, validator=_counts)

    @chz.validate
    def _slices_fit(self) -> None:
        for role, slices in (("mixture", self.train_slices()), ("evaluation", self.evaluation_slices())):
            names = [part.name for part in slices]
            if repeated := sorted(name for name in names if names.count(name) > 1):
                raise UserError(f"{role} has slice {repeated[0]} twice; give it once, with the sum of the weights")
            for part in slices:
                self._check(part)

    def _check(self, part: RecallSlice) -> None:
        if self.vocab_size >= 2**31:
            raise UserError(f"vocab_size={self.vocab_size}: must be below {2**31}: tokens are 32-bit numbers")
        if self.vocab_size <= part.length:
            raise UserError(f"vocab_size={self.vocab_size}: must be larger than the length, {part.length}")
        # Keys can't run out: vocab_size > length >= 4 pairs leaves vocab_size // 2 - 1 >= pairs of them.
        needed = 2 * part.pairs * self.passes + 2 * part.pairs
        if needed > part.length:
            most = part.length // (2 * self.passes + 2)
            sizes = f"{needed} tokens (2 pairs passes + 2 pairs, passes={self.passes}) and the length is {part.length}"
            raise UserError(f"pairs={part.pairs} need {sizes}: at most {most} pairs fit")

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def made_on_device(self) -> bool:
        return True

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return sorted({part.length for part in (*self.train_slices(), *self.evaluation_slices())})

    @property
    def tokens_per_example(self) -> float:
        slices = self.train_slices()
        return sum(part.length * part.weight for part in slices) / sum(part.weight for part in slices)

    @property
    def examples_per_slice(self) -> int:
        return self.evaluation_examples

    def result_entries(self) -> dict[str, Any]:
        """Returns `chance`: accuracy of a guess among the values."""
        return {"chance": 1 / (self.vocab_size - self.vocab_size // 2)}

    def batch_shapes(self, batch_size: int) -> Batch:
        longest = max(self.train_slices(), key=lambda part: part.length)
        return jax.eval_shape(lambda: self.train_batch(0, 0, longest, batch_size))

    def train_slices(self) -> tuple[RecallSlice, ...]:
        """Returns the slices of the training mixture."""
        return self.mixture or (RecallSlice(length=self.length, pairs=self.pairs),)

    def evaluation_slices(self) -> tuple[RecallSlice, ...]:
        """Returns the slices that are evaluated, each on `evaluation_examples` examples."""
        return self.evaluation or self.train_slices()

    def slice_for(self, seed: int, call_index: int) -> RecallSlice:
        """Returns the training slice of one device call, drawn by weight; the same for the same arguments."""
        slices = self.train_slices()
        ends = np.cumsum([part.weight for part in slices])
        drawn = np.random.default_rng([seed, call_index]).random() * ends[-1]
        return slices[min(int(np.searchsorted(ends, drawn, side="right")), len(slices) - 1)]

    def train_batch(self, seed: Number, step: Number, slice: RecallSlice | None = None, batch_size: int = 64) -> Batch:
        """Returns the training batch of one step; `slice` None is the first one. Seed and step may be traced."""
        return self._stream(_TRAIN, seed, step, slice or self.train_slices()[0], batch_size)

    def evaluation_batch(
        self, seed: Number, index: Number, slice: RecallSlice | None = None, batch_size: int = 64
    ) -> Batch:
        """Returns evaluation batch number `index`, never one of the training stream; `slice` None is the first one."""
        return self._stream(_EVALUATION, seed, index, slice or self.evaluation_slices()[0], batch_size)

    def _stream(self, role: int, seed: Number, number: Number, part: RecallSlice, batch_size: int) -> Batch:
        # The size is folded in: slices evaluated at the same numbers are independent. A loop compiles sooner.
        folds = jnp.stack([jnp.asarray(fold, jnp.uint32) for fold in (role, part.length, part.pairs, number)])
        key, _ = jax.lax.scan(lambda key, fold: (jax.random.fold_in(key, fold), None), jax.random.key(seed), folds)
        return self.sample(key, part, batch_size)

    def sample(self, key: Key[Array, ""], slice: RecallSlice, batch_size: int) -> Batch:
        """Returns a batch of `slice.length` tokens and `slice.pairs` targets per row, in the order of the pairs: their
        positions are not sorted. Raises UserError where the slice does not fit the vocabulary or the passes."""
        self._check(slice)
        length, pairs, half = slice.length, slice.pairs, self.vocab_size // 2
        key_of_keys, key_of_values, key_of_gaps, key_of_filler = jax.random.split(key, 4)
        keys = 1 + _distinct(key_of_keys, batch_size, half - 1, pairs)
        values = half + _distinct(key_of_values, batch_size, self.vocab_size - half, pairs)
        context_length = 2 * pairs * self.passes
        gaps = _gaps(key_of_gaps, batch_size, (length - context_length) // 2, pairs, self.power)
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
        return _remaining(rank, jnp.sort(keys, axis=1))


def _distinct(key: Key[Array, ""], batch_size: int, choices: int, count: int) -> Int[Array, "b n"]:
    """Returns `count` different numbers of 0 .. choices - 1 per row, every ordered selection equally likely."""
    if choices < 4 * count:
        # Redrawing would take long when few choices are left; a random number per choice is cheap then.
        return jax.lax.top_k(jax.random.uniform(key, (batch_size, choices)), count)[1].astype(jnp.int32)
    # All numbers are drawn, and those that repeat an earlier one of their row again until none does. Nothing here
    # distinguishes one number from another, so all ordered selections are equally likely. It takes a few rounds.
    earlier = jnp.tri(count, k=-1, dtype=bool)

    def draw(round: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, round), (batch_size, count), 0, choices, jnp.int32)

    def repeats(drawn: jax.Array) -> jax.Array:
        return jnp.any((drawn[:, :, None] == drawn[:, None, :]) & earlier, axis=-1)

    def redraw(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        drawn, repeated, round = carry
        drawn = jnp.where(repeated, draw(round), drawn)
        return drawn, repeats(drawn), round + 1

    none = jnp.zeros((batch_size, count), jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), redraw, (none, none == 0, jnp.uint32(0)))[0]


def _remaining(rank: Int[Array, "b t"], taken: Int[Array, "b n"]) -> Int[Array, "b t"]:
    """Returns the number at `rank` among 0, 1, 2, ... without `taken`, which is sorted and without repeats."""
    # taken[i] - i numbers before taken[i] are free, so taken[i] comes before the free number of this rank iff that is
    # <= rank.
    free_before = taken - jnp.arange(taken.shape[1], dtype=taken.dtype)
    return rank + jnp.sum(free_before[:, None, :] <= rank[:, :, None], axis=-1, dtype=rank.dtype)


def _gaps(key: Key[Array, ""], batch_size: int, space: int, count: int, power: float) -> Int[Array, "b n"]:
    """Returns `count` slots of 0 .. space - 1 per row, drawn in turn without replacement, p(i) ~ (i+1)^(power-1)."""
    # Top-k of log p + Gumbel noise gives the slots in the order in which successive draws give them.
    log_weight = (power - 1) * np.log(np.arange(1, space + 1))
    noise = jax.random.gumbel(key, (batch_size, space)) + jnp.asarray(log_weight, jnp.float32)
    return jax.lax.top_k(noise, count)[1].astype(jnp.int32)
