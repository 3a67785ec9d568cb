"""State tracking: products of the elements of a group read so far (word problems, permutation composition).

    tokens   g1   g2     g3
    label    g1   g1 g2  g1 g2 g3        (with labels="last" the product of all, at the last token)

A group is named by its factors: Z2 is parity, Z60, A4xZ5 and A5 have 60 elements, S5 has 120; Sn composes permutations
of n things. In ab, a acts first. Abelian and solvable groups (Z2, Z60, A4xZ5) lie in TC0, the word problems of A5 and
S5 are complete for NC1: a fixed number of layers of attention, or of recurrences with diagonal transitions, does not
solve them at every length.

Sources: Merrill, Petty, Sabharwal, The Illusion of State in State-Space Models (arXiv 2404.08819), section 5;
jopetty/word-problem; parity: Grazzi et al. (arXiv 2411.12537).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Literal

import chz
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from recollect.configuration import UserError
from recollect.data.batch import Batch
from recollect.data.synthetics.task import Slice, SyntheticTask

LARGEST = 1024
"""Elements of the largest group, whose multiplication table has a million entries."""


@chz.chz(typecheck=True)
class StateTracking(SyntheticTask):
    """Products of group elements.

    Attributes:
      group: factors joined by x, each Zn (cyclic), Sn (all permutations) or An (the even ones).
      length: tokens of an example, independent and uniform over the group.
      labels: "all" labels every prefix, "last" only the whole sequence.
    """

    group: str = "A5"
    length: int = 32
    labels: Literal["all", "last"] = "all"
    breakdown = "position"

    def check(self, slice: Slice) -> None:
        if (order := _order(self.group)) is None:
            raise UserError(f"group={self.group}: no group; name factors Zn, Sn or An, for example Z60, A4xZ5 or S5")
        if not 2 <= order <= LARGEST:
            raise UserError(f"group={self.group} has {order:,} elements: 2 to {LARGEST:,} fit, for example S6 (720)")

    @property
    def vocabulary(self) -> int:
        return len(multiplication_table(self.group))

    def slice(self) -> Slice:
        return Slice(length=self.length)

    def chance(self, slice: Slice) -> float:
        return 1 / self.vocabulary

    def group_names(self, slice: Slice) -> tuple[str, ...]:
        """Positions by powers of two: "8" is the 5th to the 8th."""
        return tuple(str(2**power) for power in range((slice.length - 1).bit_length() + 1))

    def sample(self, key: Key[Array, ""], slice: Slice, batch_size: int) -> Batch:
        """Returns a batch whose labels are the products of the prefixes."""
        table = jnp.asarray(multiplication_table(self.group))
        shape = (batch_size, slice.length)
        tokens = jax.random.randint(key, shape, 0, len(table), jnp.int32)
        products = jax.lax.associative_scan(lambda left, right: table[left, right], tokens, axis=1)
        powers = jnp.asarray([place.bit_length() for place in range(slice.length)], jnp.int32)
        groups, positions = jnp.broadcast_to(powers, shape), jnp.broadcast_to(jnp.arange(slice.length), shape)
        kept = np.s_[:, -1:] if self.labels == "last" else np.s_[:, :]
        weights = jnp.ones(products[kept].shape, jnp.float32)
        return Batch(tokens, products[kept], positions[kept], weights, groups=groups[kept])


@functools.lru_cache(maxsize=16)
def multiplication_table(group: str) -> np.ndarray:
    """Returns the product of each two elements of a group, int32 (n, n). Element 0 is the identity; permutations are in
    the order of their tuples, pairs of a product of groups in that of their first members."""
    table = np.zeros((1, 1), np.int32)
    for kind, size in _factors(group):
        factor = _cyclic(size) if kind == "Z" else _permutations(size, even=kind == "A")
        n, m = len(table), len(factor)
        pairs = table[:, None, :, None] * m + factor[None, :, None, :]
        table = pairs.reshape(n * m, n * m)
    return table.astype(np.int32)


def _factors(group: str) -> list[tuple[str, int]]:
    if not re.fullmatch(r"[ZSA][1-9]\d{0,5}(x[ZSA][1-9]\d{0,5})*", group):
        return []
    return [(factor[0], int(factor[1:])) for factor in group.split("x")]


def _order(group: str) -> int | None:
    orders = [
        size if kind == "Z" else max(1, math.factorial(min(size, 12)) // (2 if kind == "A" else 1))
        for kind, size in _factors(group)
    ]
    return math.prod(orders) if orders else None


def _cyclic(size: int) -> np.ndarray:
    return np.add.outer(np.arange(size), np.arange(size)) % size


def _permutations(size: int, *, even: bool) -> np.ndarray:
    """Returns the table of the permutations of `size` things, or of those that are even."""
    elements = np.array([one for one in itertools.permutations(range(size)) if not even or _is_even(one)])
    digits = size ** np.arange(size)[::-1]
    numbers = np.zeros(size**size, np.int32)
    numbers[elements @ digits] = np.arange(len(elements))
    # a acts first: i goes to b[a[i]].
    return numbers[elements[:, elements] @ digits].T


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(left > right for left, right in pairs) % 2 == 0
