"""Stacks: symbols are pushed on several stacks; what does each pop give?

    tokens   push 1 a   push 2 b   push 1 c   pop 1 c   pop 2
    label                                         c         b

Each operation pushes or pops with equal probability, a random stack that isn't empty; on empty ones it pushes. The last
one pops where it can, so that something is asked in each example.

Source: Kimi Linear (arXiv 2510.26692), the stack task.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from recollect.configuration import UserError, at_least
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask

_PUSH, _POP, _FIRST = 0, 1, 2


@chz.chz(typecheck=True)
class StackSlice(Slice):
    """Examples of one size: `operations`, length 3 operations - 1."""

    operations: int = chz.field(validator=at_least(2))


@chz.chz(typecheck=True)
class Stacks(SyntheticTask):
    """The symbols that stacks give back, last in, first out.

    Attributes:
      stacks: how many there are.
      symbols: how many there are to draw from.
      operations: pushes and pops.
    """

    stacks: int = chz.field(default=8, validator=at_least(1))
    symbols: int = chz.field(default=26, validator=at_least(2))
    operations: int = 32

    @property
    def vocabulary(self) -> int:
        return _FIRST + self.stacks + self.symbols

    def slice(self) -> StackSlice:
        return stack_slice(self.operations)

    def scaled(self, slice: StackSlice, factor: int) -> StackSlice:
        return stack_slice(factor * slice.operations)

    def check(self, slice: StackSlice) -> None:
        if slice.length != (length := 3 * slice.operations - 1):
            raise UserError(f"length={slice.length}: {slice.operations} operations take {length} tokens")

    def chance(self, slice: StackSlice) -> float:
        return 1 / self.symbols

    def spelling(self, token: int) -> str:
        symbol = token - _FIRST - self.stacks
        return ("push", "pop")[token] if token < _FIRST else f"#{token - _FIRST}" if symbol < 0 else str(symbol)

    def sample(self, key: Key[Array, ""], slice: StackSlice, batch_size: int) -> Batch:
        """Returns a batch with a target per operation, of which those of pushes have weight 0."""
        b, operations, rows = batch_size, slice.operations, jnp.arange(batch_size)
        of_pops, of_stacks, of_symbols = jax.random.split(key, 3)
        pops = jax.random.bernoulli(of_pops, 0.5, (operations, b)).at[-1].set(True)
        scores = jax.random.uniform(of_stacks, (operations, b, self.stacks))
        pushed = jax.random.randint(of_symbols, (operations, b), 0, self.symbols, jnp.int32)

        def operate(carry: tuple[Array, Array], drawn: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            # Stacks are lists of operations: the one on top of each stack, and the one below each operation; -1: none.
            top, below = carry
            number, pop, score = drawn
            pop = pop & jnp.any(top >= 0, axis=1)
            stack = jnp.argmax(jnp.where(pop[:, None] & (top < 0), -1.0, score), axis=1).astype(jnp.int32)
            on_top = top[rows, stack]
            below = below.at[:, number].set(on_top)
            top = top.at[rows, stack].set(jnp.where(pop, below[rows, on_top], number))
            return (top, below), jnp.stack([pop.astype(jnp.int32), stack, jnp.where(pop, on_top, number)])

        empty = (jnp.full((b, self.stacks), -1, jnp.int32), jnp.full((b, operations), -1, jnp.int32))
        numbers = jnp.arange(operations, dtype=jnp.int32)
        popped, stack, source = jax.lax.scan(operate, empty, (numbers, pops, scores))[1].transpose(1, 2, 0)
        symbols = _FIRST + self.stacks + jnp.take_along_axis(pushed.T, source, axis=1)
        kinds = jnp.where(popped, _POP, _PUSH)
        tokens = jnp.stack([kinds, _FIRST + stack, symbols], axis=2).reshape(b, -1)[:, :-1].astype(jnp.int32)
        positions = jnp.broadcast_to(3 * numbers + 1, symbols.shape)
        return Batch(tokens, symbols, positions, popped.astype(jnp.float32))


def stack_slice(operations: int) -> StackSlice:
    """Returns the slice of a number of operations."""
    return StackSlice(length=3 * operations - 1, operations=operations)
