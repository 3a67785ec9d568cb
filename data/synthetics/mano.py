"""Mano (PhysicsLM4): modular arithmetic on an expression in prefix notation.

    tokens   . . - * 4 a 7 =       ((4 * a) - 7 modulo 23)
    label                  value

Every tree of the drawn number of operations is equally likely, and so are operators and operands.

Source: Allen-Zhu, Physics of Language Models 4.1 (arXiv 2512.17351), Mano; PhysicsLM4: modulus 23, up to 10, 13 or 16
operations of the set "asm" (add, subtract, multiply).
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.answers import answered
from recollect.data.synthetics.orders import shuffled
from recollect.data.synthetics.task import Slice, SyntheticTask

OPERATORS = "asm"
_BLANK, _EQUALS, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class ManoSlice(Slice):
    """Expressions of `smallest` to `operations` operations, length 2 operations + 2."""

    operations: int = chz.field(validator=at_least(1))
    smallest: int = chz.field(validator=at_least(1))


@chz.chz(typecheck=True)
class Mano(SyntheticTask):
    """The value of an expression modulo a number.

    Attributes:
      operations, smallest: most and fewest operations, uniformly drawn between them.
      modulus: values and operands are 0 .. modulus - 1.
      operators: any of a (add), s (subtract), m (multiply).
    """

    operations: int = 10
    smallest: int = 1
    modulus: int = 23
    operators: str = OPERATORS

    breakdown = "operations"

    @property
    def vocabulary(self) -> int:
        return _FIRST + len(OPERATORS) + self.modulus

    def slice(self) -> ManoSlice:
        return mano_slice(self.operations, self.smallest)

    def scaled(self, slice: ManoSlice, factor: int) -> ManoSlice:
        """Returns the slice of exactly `factor` times as many operations."""
        return chz.replace(mano_slice(factor * slice.operations, factor * slice.operations), weight=slice.weight)

    def check(self, slice: ManoSlice) -> None:
        if not self.operators or set(self.operators) - set(OPERATORS):
            raise UserError(f"operators={self.operators}: must be some of {OPERATORS} (add, subtract, multiply)")
        if not 2 <= self.modulus <= 2**15:
            raise UserError(f"modulus={self.modulus}: must be 2 to {2**15}, products are 32-bit numbers")
        if slice.smallest > slice.operations:
            raise UserError(f"smallest={slice.smallest}: must be at most operations={slice.operations}")
        if slice.length != (length := 2 * slice.operations + 2):
            raise UserError(f"length={slice.length}: {slice.operations} operations take {length} tokens")

    def chance(self, slice: ManoSlice) -> float:
        return 1 / self.modulus

    def group_names(self, slice: ManoSlice) -> tuple[str, ...]:
        return tuple(str(count) for count in range(slice.operations + 1))

    def spelling(self, token: int) -> str:
        return ".=+-*"[token] if token < _FIRST + len(OPERATORS) else str(token - _FIRST - len(OPERATORS))

    def sample(self, key: Key[Array, ""], slice: ManoSlice, batch_size: int) -> Batch:
        """Returns a batch with one target per row."""
        b, length = batch_size, 2 * slice.operations + 1
        of_counts, of_order, of_operators, of_operands = jax.random.split(key, 4)
        count = jax.random.randint(of_counts, (b, 1), slice.smallest, slice.operations + 1, jnp.int32)
        is_operator = _prefix_trees(of_order, count, length)
        allowed = jnp.asarray([OPERATORS.index(name) for name in sorted(set(self.operators))], jnp.int32)
        operators = allowed[jax.random.randint(of_operators, (b, length), 0, len(allowed))]
        operands = len(OPERATORS) + jax.random.randint(of_operands, (b, length), 0, self.modulus, jnp.int32)
        tokens = _FIRST + jnp.where(is_operator, operators, operands)
        tokens = jnp.where(jnp.arange(length) < length - 2 * count - 1, _BLANK, tokens)
        prompt = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=_EQUALS)
        value = _value(tokens, self.modulus)
        return answered(prompt, _FIRST + len(OPERATORS) + value[:, None], groups=count)


def mano_slice(operations: int, smallest: int) -> ManoSlice:
    """Returns the slice of `smallest` to `operations` operations."""
    return ManoSlice(length=2 * operations + 2, operations=operations, smallest=smallest)


def _prefix_trees(key: Key[Array, ""], count: Int[Array, "b 1"], length: int) -> Array:
    """Returns which of the last 2 count + 1 places hold operators, every binary tree equally likely, (b, length).

    Of the rotations of any order of count operators and count + 1 operands exactly one is an expression in prefix
    notation: the one that begins after the first minimum of operands left to read (the cycle lemma).
    """
    used = 2 * count + 1
    start = length - used
    place = jnp.arange(length)
    # Blank places come first; the others hold count operators in a random order.
    rank = shuffled(key, count.shape[0], length, place >= start) - start
    is_operator = (rank >= 0) & (rank < count)
    steps = jnp.where(place < start, 0, jnp.where(is_operator, 1, -1))
    sums = jnp.where(place < start, length, jnp.cumsum(steps, axis=1))
    begin = jnp.argmin(sums, axis=1, keepdims=True) + 1
    rotated = start + (place - start + begin - start) % used
    return jnp.where(place < start, False, jnp.take_along_axis(is_operator, jnp.clip(rotated, 0, length - 1), axis=1))


def _value(tokens: Int[Array, "b t"], modulus: int) -> Int[Array, " b"]:
    """Returns the values of expressions in prefix notation, read from the right with a stack."""
    b, length = tokens.shape
    places = jnp.arange(length // 2 + 2)

    def read(carry: tuple[Array, Array], token: Array) -> tuple[tuple[Array, Array], None]:
        stack, size = carry  # the top is at size - 1
        top, below = (jnp.take_along_axis(stack, jnp.maximum(size - i, 0)[:, None], axis=1)[:, 0] for i in (1, 2))
        operator = token - _FIRST
        results = jnp.stack([top + below, top - below, top * below]) % modulus
        is_operator = (operator >= 0) & (operator < len(OPERATORS))
        result = jnp.take_along_axis(results, jnp.clip(operator, 0, 2)[None], axis=0)[0]
        value = jnp.where(is_operator, result, operator - len(OPERATORS))
        size = jnp.where(token == _BLANK, size, jnp.where(is_operator, size - 1, size + 1))
        written = (places == size[:, None] - 1) & (token != _BLANK)[:, None]
        return (jnp.where(written, value[:, None], stack), size), None

    start = (jnp.zeros((b, len(places)), jnp.int32), jnp.zeros(b, jnp.int32))
    return jax.lax.scan(read, start, tokens.T, reverse=True)[0][0][:, 0]
