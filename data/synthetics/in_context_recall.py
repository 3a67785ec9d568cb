"""In-context recall (MAD): keys and values in turn; a key that comes again has the value that it had. With noise, pairs
of other tokens stand between them.

    tokens   a x b y a x n m b        (n m is noise)
    label            x       y

Keys are drawn with replacement; the last is one that was there before. Models train on every next token and are scored
on values of keys that were there before, the last pair among them.

Source: Poli et al., Mechanistic Design and Scaling of Hybrid Architectures (MAD, arXiv 2403.17844), appendix;
athms/mad-lab, mad/data/instances.py with `multi_query`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from recollect.configuration import UserError, at_least, requires
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask

_below_one = requires(lambda share: 0 <= share < 1, "must be at least 0 and below 1")


@chz.chz(typecheck=True)
class RecalledTokens(SyntheticTask):
    """Base of tasks that train on every next token and are scored on those that the context determines.

    Attributes:
      labels: what is trained: "all", every next token, or "recalled", only what is scored.
    """

    labels: Literal["all", "recalled"] = "all"

    def scores(self, slices: tuple[Any, ...], batch: Batch, correct: Array, loss: Array) -> dict[str, Any]:
        """Returns the scores of recalled tokens."""
        scored = batch.weights * (batch.groups == 1)
        return super().scores(slices, dataclasses.replace(batch, weights=scored), correct, loss)

    def batch(self, sequence: Int[Array, "b s"], recalled: Bool[Array, "b s"]) -> Batch:
        """Returns the batch of sequences, one token longer than its inputs, of which some tokens are `recalled`."""
        scored = recalled[:, 1:]
        weights = jnp.ones(scored.shape, jnp.float32) if self.labels == "all" else scored.astype(jnp.float32)
        return Batch(sequence[:, :-1], sequence[:, 1:], None, weights, groups=scored.astype(jnp.int32))


@chz.chz(typecheck=True)
class InContextRecall(RecalledTokens):
    """Values of keys that came before.

    Attributes:
      vocab_size: token ids: half of those that aren't noise are keys, then come values, then noise.
      noise_tokens: ids of noise.
      noise: probability that a pair is noise.
    """

    vocab_size: int = 16
    length: int = 127
    noise_tokens: int = chz.field(default=0, validator=at_least(0))
    noise: float = chz.field(default=0.0, validator=_below_one)

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @property
    def _keys(self) -> int:
        return (self.vocab_size - self.noise_tokens) // 2

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def scaled(self, slice: Slice, factor: int) -> Slice:
        return chz.replace(slice, length=factor * (slice.length + 1) - 1)

    def check(self, slice: Slice) -> None:
        if slice.length < 3 or slice.length % 2 == 0:
            raise UserError(f"length={slice.length}: must be odd and at least 3, the last value is only a label")
        if self.vocab_size < (needed := self.noise_tokens + 4):
            raise UserError(f"vocab_size={self.vocab_size}: with noise_tokens={self.noise_tokens} take {needed}")
        if self.noise and not self.noise_tokens:
            raise UserError(f"noise={self.noise}: needs tokens to draw noise from, set noise_tokens")

    def chance(self, slice: Slice) -> float:
        return 1 / (self.vocab_size - self.noise_tokens - self._keys)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch in which every position has a target."""
        b, slots, keys = batch_size, (slice.length + 1) // 2, self._keys
        values_of, of_keys, of_noise, of_pairs, of_sure, of_last = jax.random.split(key, 6)
        rows, first_noise = jnp.arange(b)[:, None], self.vocab_size - self.noise_tokens
        values = jax.random.randint(values_of, (b, keys), keys, first_noise, jnp.int32)
        drawn = jax.random.randint(of_keys, (b, slots), 0, keys, jnp.int32)
        is_pair = jax.random.uniform(of_pairs, (b, slots)) >= self.noise
        # One pair is sure; what comes last is drawn from the keys that were there.
        sure = jax.random.randint(of_sure, (b, 1), 0, slots - 1, jnp.int32)
        is_pair = is_pair.at[rows, sure].set(True).at[:, -1].set(True)
        place = jnp.broadcast_to(jnp.arange(slots), (b, slots))
        first = jnp.full((b, keys), slots).at[rows, drawn[:, :-1]].min(jnp.where(is_pair, place, slots)[:, :-1])
        last = jnp.argmax(jnp.where(first < slots, jax.random.uniform(of_last, (b, keys)), -1.0), axis=1)
        drawn = drawn.at[:, -1].set(last.astype(jnp.int32))
        again = is_pair & (jnp.take_along_axis(first, drawn, axis=1) < place)
        pairs = jnp.stack([drawn, jnp.take_along_axis(values, drawn, axis=1)], axis=2)
        if self.noise:
            noise = jax.random.randint(of_noise, pairs.shape, first_noise, self.vocab_size, jnp.int32)
            pairs = jnp.where(is_pair[:, :, None], pairs, noise)
        recalled = jnp.stack([jnp.zeros_like(again), again], axis=2)
        return self.batch(pairs.reshape(b, -1), recalled.reshape(b, -1))
