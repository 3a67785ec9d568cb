"""Training sets of finitely many examples, shuffled in every epoch, without a table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt

from recollect.data.batch import Batch

if TYPE_CHECKING:
    from recollect.data.synthetics.task import SyntheticTask

_ROUNDS = 4


def batch_of_set(task: SyntheticTask, key: Key[Array, ""], step: Any, slice: Any, batch_size: int) -> Batch:
    """Returns the batch of one step from a set of `task.train_examples` examples.

    Step s has the places s batch_size .. of the endless sequence of epochs. An epoch takes every example once, in its
    own order; a batch may contain the end of one and the beginning of the next. Which examples are in the set depends
    on the key alone, not on the batch size.
    """
    size = task.train_examples
    assert size is not None
    of_set, of_order = jax.random.split(key)
    places = jnp.asarray(step, jnp.uint32) * batch_size + jnp.arange(batch_size, dtype=jnp.uint32)

    def example(place: jax.Array) -> Batch:
        number = permuted(jax.random.fold_in(of_order, place // size), place % size, size)
        return task.sample(jax.random.fold_in(of_set, number), slice, 1)

    return jax.tree.map(lambda leaf: leaf[:, 0], jax.vmap(example)(places))


def permuted(key: Key[Array, ""], place: UInt[Array, ""], size: int) -> UInt[Array, ""]:
    """Returns where a random permutation of 0 .. size - 1, given by the key, takes a place.

    A Feistel network permutes the numbers of the next even number of bits; those beyond `size` are permuted again until
    they fall below it (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    keys = jax.random.split(key, _ROUNDS)

    def network(number: jax.Array) -> jax.Array:
        def round_(halves: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            left, right = halves
            return (right, left ^ (jax.random.bits(jax.random.fold_in(key, right)) & mask)), None

        (left, right), _ = jax.lax.scan(round_, (number >> bits, number & mask), keys)
        return (left << bits) | right

    return jax.lax.while_loop(lambda number: number >= size, network, network(place.astype(jnp.uint32)))
