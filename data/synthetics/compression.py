"""Compression (MAD): a sequence is asked of the vector that its last token has.

    tokens   a c b a .        (the dot is the last token of every sequence)
    label    a c b a .

Only for a model whose head sees one vector per sequence, `models.Autoencoder`: any other finds each label at its place.

Source: Poli et al., Mechanistic Design and Scaling of Hybrid Architectures (MAD, arXiv 2403.17844), compression, which
scores the last token too.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask


@chz.chz(typecheck=True)
class Compression(SyntheticTask):
    """Random symbols, all asked again.

    Attributes:
      vocab_size: token ids; the last one ends every sequence.
    """

    vocab_size: int = chz.field(default=16, validator=at_least(3))
    length: int = 32

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if slice.length < 2:
            raise UserError(f"length={slice.length}: take at least 2, the last token is no symbol")

    def chance(self, slice: Slice) -> float:
        return ((slice.length - 1) / (self.vocab_size - 1) + 1) / slice.length

    def spelling(self, token: int) -> str:
        return "." if token == self.vocab_size - 1 else str(token)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch in which every position has its own token as a target."""
        symbols = jax.random.randint(key, (batch_size, slice.length - 1), 0, self.vocab_size - 1, jnp.int32)
        tokens = jnp.pad(symbols, ((0, 0), (0, 1)), constant_values=self.vocab_size - 1)
        return Batch(tokens, tokens, None, jnp.ones(tokens.shape, jnp.float32))
