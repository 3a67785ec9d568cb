"""Copying: symbols, then the same ones again, in their order or reversed (the palindrome task).

    tokens   . . c a b | c a b          (dots are blanks)
    label              c a b end

Sources: Jelassi et al., Repeat After Me (arXiv 2402.01032), copying; Kimi Linear (arXiv 2510.26692), palindrome.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.task import Slice, SyntheticTask

_BLANK, _SEPARATOR, _END, _FIRST = 0, 1, 2, 3


@chz.chz(typecheck=True)
class CopySlice(Slice):
    """Copies of `fewest` to `most` symbols, length 2 most + 1."""

    fewest: int = chz.field(validator=at_least(1))
    most: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class Copying(SyntheticTask):
    """The symbols of the input once more, and where they end.

    Attributes:
      symbols: how many there are to draw from.
      fewest, most: fewest and most symbols, uniformly drawn between them.
      order: "forward", or "reversed": the last symbol first.
    """

    symbols: int = chz.field(default=26, validator=at_least(2))
    fewest: int = 5
    most: int = 20
    order: Literal["forward", "reversed"] = "forward"

    breakdown = "place"

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.symbols

    def slice(self) -> CopySlice:
        return copy_slice(self.fewest, self.most)

    def scaled(self, slice: CopySlice, factor: int) -> CopySlice:
        """Returns the slice of exactly `factor` times as many symbols."""
        return copy_slice(factor * slice.most, factor * slice.most)

    def check(self, slice: CopySlice) -> None:
        if slice.fewest > slice.most:
            raise UserError(f"fewest={slice.fewest}: must be at most most={slice.most}")
        if slice.length != (length := 2 * slice.most + 1):
            raise UserError(f"length={slice.length}: up to {slice.most} symbols and their copy take {length} tokens")

    def chance(self, slice: CopySlice) -> float:
        return 1 / self.symbols

    def group_names(self, slice: CopySlice) -> tuple[str, ...]:
        return tuple(str(place) for place in range(slice.most + 1))

    def spelling(self, token: int) -> str:
        return (".", "|", "end")[token] if token < _FIRST else str(token - _FIRST)

    def sample(self, key: Key[Array, ""], slice: CopySlice, batch_size: int) -> Batch:
        """Returns a batch with a target per symbol and one for the end, up to most + 1 per row."""
        b, most = batch_size, slice.most
        of_counts, of_symbols = jax.random.split(key)
        count = jax.random.randint(of_counts, (b, 1), slice.fewest, most + 1, jnp.int32)
        symbols = jax.random.randint(of_symbols, (b, most), _FIRST, self.vocabulary, jnp.int32)
        place = jnp.arange(most + 1)
        shown = jnp.where(place[:most] < most - count, _BLANK, symbols)
        source = most - 1 - place if self.order == "reversed" else most - count + place
        source = jnp.broadcast_to(jnp.clip(source, 0, most - 1), (b, most + 1))
        copied = jnp.take_along_axis(symbols, source, axis=1)
        answer = jnp.where(place < count, copied, jnp.where(place == count, _END, _BLANK))
        prompt = jnp.pad(shown, ((0, 0), (0, 1)), constant_values=_SEPARATOR)
        return answered(prompt, answer, weights=place <= count, groups=place)


def copy_slice(fewest: int, most: int) -> CopySlice:
    """Returns the slice of copies of `fewest` to `most` symbols."""
    return CopySlice(length=2 * most + 1, fewest=fewest, most=most)
