"""Induction heads: what came after the mark, the first time?

    tokens   c a * b d a c *
    label                  b

Source: Gu and Dao, Mamba (arXiv 2312.00752), section 4.1.2.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask

_MARK, _FIRST = 0, 1


@chz.chz(typecheck=True)
class InductionHeads(SyntheticTask):
    """The token after the earlier one of two marks.

    Attributes:
      vocab_size: token ids, of which the first is the mark.
    """

    vocab_size: int = chz.field(default=16, validator=at_least(3))
    length: int = 256

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def check(self, slice: Slice) -> None:
        if slice.length < 3:
            raise UserError(f"length={slice.length}: two marks and a token between them take 3")

    def chance(self, slice: Slice) -> float:
        return 1 / (self.vocab_size - _FIRST)

    def spelling(self, token: int) -> str:
        return "*" if token == _MARK else str(token - _FIRST)

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch with one target per row, on its last place."""
        of_tokens, of_place = jax.random.split(key)
        tokens = jax.random.randint(of_tokens, (batch_size, slice.length), _FIRST, self.vocab_size, jnp.int32)
        place = jax.random.randint(of_place, (batch_size, 1), 0, slice.length - 2, jnp.int32)
        tokens = tokens.at[jnp.arange(batch_size)[:, None], place].set(_MARK).at[:, -1].set(_MARK)
        answer = jnp.take_along_axis(tokens, place + 1, axis=1)
        return Batch(tokens, answer, jnp.full_like(place, slice.length - 1), jnp.ones(place.shape, jnp.float32))
