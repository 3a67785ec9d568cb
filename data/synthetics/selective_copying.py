"""Selective copying: symbols among blanks; then they are asked, in their order.

    tokens   . c . . a b . ? . . .      (dots are blanks)
    label                    c a b

Sources: Gu and Dao, Mamba (arXiv 2312.00752), section 4.1.1; MAD (arXiv 2403.17844), selective copying. Every choice
of places is equally likely here; MAD's generator never leaves a blank after the last symbol.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.draws import distinct
from recollect.data.synthetics.task import Slice, SyntheticTask

_BLANK, _ASK, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class SelectiveCopySlice(Slice):
    """Examples of one size: `copies` symbols to copy in `length` tokens."""

    copies: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class SelectiveCopying(SyntheticTask):
    """The symbols of the input without the blanks between them.

    Attributes:
      vocab_size: token ids; the first two are the blank and the question.
      length, copies: of the one slice, where no others are named.
    """

    vocab_size: int = chz.field(default=16, validator=at_least(4))
    length: int = 128
    copies: int = 16

    breakdown = "place"

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    def slice(self) -> SelectiveCopySlice:
        return SelectiveCopySlice(length=self.length, copies=self.copies)

    def check(self, slice: SelectiveCopySlice) -> None:
        if slice.length < (needed := 2 * slice.copies + 1):
            raise UserError(f"length={slice.length}: {slice.copies} copies need at least {needed} tokens")

    def chance(self, slice: SelectiveCopySlice) -> float:
        return 1 / (self.vocab_size - _FIRST)

    def group_names(self, slice: SelectiveCopySlice) -> tuple[str, ...]:
        return tuple(str(place) for place in range(slice.copies))

    def spelling(self, token: int) -> str:
        return ".?"[token] if token < _FIRST else str(token - _FIRST)

    def sample(self, key: Key[Array, ""], slice: SelectiveCopySlice, batch_size: int) -> Batch:
        """Returns a batch with `copies` targets per row, on its last places."""
        shape, ask = (batch_size, slice.copies), slice.length - slice.copies - 1
        of_symbols, of_places = jax.random.split(key)
        symbols = jax.random.randint(of_symbols, shape, _FIRST, self.vocab_size, jnp.int32)
        places = jnp.sort(distinct(of_places, batch_size, ask, slice.copies), axis=1)
        tokens = jnp.full((batch_size, slice.length), _BLANK, jnp.int32).at[:, ask].set(_ASK)
        tokens = tokens.at[jnp.arange(batch_size)[:, None], places].set(symbols, unique_indices=True)
        order = jnp.broadcast_to(jnp.arange(slice.copies, dtype=jnp.int32), shape)
        return Batch(tokens, symbols, ask + 1 + order, jnp.ones(shape, jnp.float32), groups=order)
