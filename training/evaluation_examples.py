"""A recall task's evaluation where a batch is smaller or larger than the chunks in which its examples are drawn.

A smaller `run.batch_size` takes a chunk in pieces, a larger one as many whole chunks as fit: the same examples either
way. (`Program.evaluate` takes one chunk at a time where that fits.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from recollect.data.batch import Batch
from recollect.models.functional import Params

if TYPE_CHECKING:
    from recollect.training.step import Program

Sums = dict[str, jax.Array]


def sum_over_chunks(
    program: Program, params: Params, seed: jax.Array, data_slice: Any, examples: int, chunk: int
) -> Sums:
    """Returns `Program.sums` added up over `examples` examples, at most `run.batch_size` at a time, drawn `chunk` by
    `chunk`."""
    most = program.experiment.run.batch_size
    group = max(1, min(most // chunk, -(-examples // chunk)))

    def of_group(index: jax.Array) -> Sums:
        numbers = index * group + jnp.arange(group)
        chunks = jax.vmap(lambda number: program.data.evaluation_batch(seed, number, data_slice, chunk))(numbers)
        batch = jax.tree.map(lambda leaf: leaf.reshape(group * chunk, *leaf.shape[2:]), chunks)
        inside = (index * group * chunk + jnp.arange(group * chunk)) < examples
        return in_pieces(lambda piece, weights: program.sums(params, piece, weights), batch, inside, most)

    return _added_up(of_group, jnp.arange(-(-examples // (group * chunk))))


def in_pieces(sums: Callable[[Batch, jax.Array], Sums], batch: Batch, inside: jax.Array, most: int) -> Sums:
    """Returns `sums` of the rows `inside` a batch, at most `most` rows at a time; the last are filled with padding."""
    rows = len(inside)
    count = -(-rows // most)
    size = -(-rows // count)

    def split(leaf: jax.Array) -> jax.Array:
        filled = jnp.pad(leaf, [(0, count * size - rows)] + [(0, 0)] * (leaf.ndim - 1))
        return filled.reshape(count, size, *leaf.shape[1:])

    pieces = jax.tree.map(split, (batch, batch.weights * inside[:, None]))
    return _added_up(lambda piece: sums(*piece), pieces)


def _added_up(function: Callable[[Any], Sums], inputs: Any) -> Sums:
    zero = {name: jnp.zeros(()) for name in ("loss", "correct", "weight")}
    return jax.lax.scan(lambda total, one: (jax.tree.map(jnp.add, total, function(one)), None), zero, inputs)[0]
