"""Memorization (MAD): keys have one value each for good, learned in the weights.

    tokens   a ? c ? b ? a ?
    label      x   z   y   x

Source: MAD (arXiv 2403.17844), memorization; no two keys share a value.
"""

from __future__ import annotations

import functools

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask


@chz.chz(typecheck=True)
class Memorization(SyntheticTask):
    """Values of keys, the same in every example.

    Attributes:
      vocab_size: token ids: half of all but the last are keys, then come values; the last is the question.
      facts: seed of the values, the same in training and evaluation.
    """

    vocab_size: int = chz.field(default=256, validator=at_least(4))
    length: int = 32
    facts: int = 0

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if slice.length % 2:
            odd = f"length={slice.length}: must be even, a question follows each key"
            raise UserError(f"{odd}; take {slice.length + 1}")

    def chance(self, slice: Slice) -> float:
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def spelling(self, token: int) -> str:
        return "?" if token == self.vocab_size - 1 else str(token)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with a target at every second position."""
        values = jnp.asarray(values_of_keys(self.vocab_size, self.facts))
        keys = jax.random.randint(key, (batch_size, slice.length // 2), 0, len(values), jnp.int32)
        tokens = jnp.stack([keys, jnp.full_like(keys, self.vocab_size - 1)], axis=2).reshape(batch_size, -1)
        positions = jnp.broadcast_to(jnp.arange(1, slice.length, 2, dtype=jnp.int32), keys.shape)
        return Batch(tokens, values[keys], positions, jnp.ones(keys.shape, jnp.float32))


@functools.lru_cache(maxsize=8)
def values_of_keys(vocab_size: int, seed: int) -> np.ndarray:
    """Returns the value of each key, int32 (keys,), all different."""
    keys = (vocab_size - 1) // 2
    return np.random.default_rng(seed).permutation(np.arange(keys, vocab_size - 1, dtype=np.int32))[:keys]
