"""A recall task's evaluation examples: the same whatever the batch size that they are evaluated in.

Examples are drawn in chunks of `CHUNK`, since a draw depends on how many are drawn together. A smaller `run.batch_size`
takes a chunk in pieces, a larger one as many whole chunks as fit.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.data.batch import Batch

CHUNK = 64

Sums = dict[str, jax.Array]


def sum_over_examples(
    draw: Callable[[jax.Array, int], Batch], sums: Callable[[Batch, jax.Array], Sums], examples: int, batch_size: int
) -> Sums:
    """Returns `sums` added up over `examples` examples, no more than `batch_size` at a time.

    Args:
      draw: returns chunk number `index` of so many examples.
      sums: of a batch, its targets weighted by the second argument.
    """
    chunk = min(CHUNK, examples)
    group = max(1, min(batch_size // chunk, -(-examples // chunk)))

    def of_group(index: jax.Array) -> Sums:
        if group == 1:
            batch, numbers = draw(index, chunk), index * chunk + jnp.arange(chunk)
        else:
            chunks = jax.vmap(lambda index: draw(index, chunk))(index * group + jnp.arange(group))
            batch = jax.tree.map(lambda leaf: leaf.reshape(group * chunk, *leaf.shape[2:]), chunks)
            numbers = index * group * chunk + jnp.arange(group * chunk)
        return in_pieces(sums, batch, batch.weights * (numbers < examples)[:, None], batch_size)

    return _added_up(of_group, jnp.arange(-(-examples // (group * chunk))))


def in_pieces(sums: Callable[[Batch, jax.Array], Sums], batch: Batch, weights: jax.Array, most: int) -> Sums:
    """Returns `sums` of a batch taken in pieces of at most `most` rows; the last is filled with rows of weight 0."""
    rows = weights.shape[0]
    if rows <= most:
        return sums(batch, weights)
    count = -(-rows // most)
    size = -(-rows // count)

    def split(leaf: jax.Array) -> jax.Array:
        filled = jnp.pad(leaf, [(0, count * size - rows)] + [(0, 0)] * (leaf.ndim - 1))
        return filled.reshape(count, size, *leaf.shape[1:])

    return _added_up(lambda piece: sums(*piece), jax.tree.map(split, (batch, weights)))


def _added_up(function: Callable[..., Sums], inputs: object) -> Sums:
    zero = {name: jnp.zeros(()) for name in ("loss", "correct", "weight")}
    return jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, function(one)), None), zero, inputs)[0]
