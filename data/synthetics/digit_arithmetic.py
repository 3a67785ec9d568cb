"""Digit arithmetic: sums, differences or products of numbers, digit by digit.

    tokens   7 4 + 5 8 = 2 3 1         (47 + 85 = 132, the lowest digit first)
    label                2 3 1         (each at the token before)

With the lowest digit first each digit needs what came before it and a carry; with the highest first the first digit
needs the whole carry.

Source: Lee et al., Teaching Arithmetic to Small Transformers (arXiv 2307.03381).
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.task import Slice, SyntheticTask

_EQUALS, _OPERATION = 10, 11
"""Tokens after the ten digits."""


@chz.chz(typecheck=True)
class DigitSlice(Slice):
    """Numbers of `digits` digits, zeros in front included; the length follows from them (`DigitArithmetic.sized`)."""

    digits: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class DigitArithmetic(SyntheticTask):
    """Arithmetic on decimal digits.

    Attributes:
      digits: of each number; digits are independent and uniform.
      operation: "+", "-" (the larger number first) or "*".
      lowest_first: order of the digits of all numbers.
    """

    digits: int = 4
    operation: Literal["+", "-", "*"] = "+"
    lowest_first: bool = True

    breakdown = "digit"

    @property
    def vocabulary(self) -> int:
        return _OPERATION + 1

    def slice(self) -> DigitSlice:
        return self.sized(self.digits)

    def sized(self, digits: int) -> DigitSlice:
        """Returns the slice of numbers of `digits` digits."""
        return DigitSlice(length=2 * digits + 2 + self._answer(digits) - 1, digits=digits)

    def _answer(self, digits: int) -> int:
        return {"+": digits + 1, "-": digits, "*": 2 * digits}[self.operation]

    def scaled(self, slice: DigitSlice, factor: int) -> DigitSlice:
        return chz.replace(self.sized(factor * slice.digits), weight=slice.weight)

    def check(self, slice: DigitSlice) -> None:
        if slice.length != (length := self.sized(slice.digits).length):
            raise UserError(f"length={slice.length}: numbers of {slice.digits} digits take {length} tokens")

    def chance(self, slice: DigitSlice) -> float:
        return 0.1

    def group_names(self, slice: DigitSlice) -> tuple[str, ...]:
        return tuple(f"10^{place}" for place in range(self._answer(slice.digits)))

    def spelling(self, token: int) -> str:
        return {_EQUALS: "=", _OPERATION: self.operation}.get(token, str(token))

    def sample(self, key: Key[Array, ""], slice: DigitSlice, batch_size: int) -> Batch:
        """Returns a batch with a target per digit of the result."""
        left, right = jax.random.randint(key, (2, batch_size, slice.digits), 0, 10, jnp.int32)
        size = self._answer(slice.digits)
        if self.operation == "-":
            less = _carried(left - right)[1][:, None] < 0
            left, right = jnp.where(less, right, left), jnp.where(less, left, right)
        if self.operation == "*":
            padded = jnp.pad(left, ((0, 0), (0, size - slice.digits)))
            shifts = jnp.stack([jnp.roll(padded, place, axis=1) for place in range(slice.digits)], axis=1)
            columns = jnp.sum(shifts * right[:, :, None], axis=1)
        else:
            columns = left + right if self.operation == "+" else left - right
            columns = jnp.pad(columns, ((0, 0), (0, size - slice.digits)))
        answer, places = _carried(columns)[0], jnp.arange(size)
        if not self.lowest_first:
            left, right, answer, places = left[:, ::-1], right[:, ::-1], answer[:, ::-1], places[::-1]
        sign, equals = (jnp.full((batch_size, 1), token, jnp.int32) for token in (_OPERATION, _EQUALS))
        prompt = jnp.concatenate([left, sign, right, equals], axis=1)
        return answered(prompt, answer, groups=places)


def _carried(columns: Int[Array, "b n"]) -> tuple[Int[Array, "b n"], Int[Array, " b"]]:
    """Returns the digits of a number given by its columns, lowest first, and the carry out of the last one: negative
    where the number is."""

    def place(carry: Array, column: Array) -> tuple[Array, Array]:
        total = column + carry
        return total // 10, total % 10

    carry, digits = jax.lax.scan(place, jnp.zeros(columns.shape[0], jnp.int32), columns.T)
    return digits.T, carry
