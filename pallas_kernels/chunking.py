"""Splits rows of tokens (b, t, ...) into chunks, joins them again, and compacts them; shared by the xla backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def chunked(x: jax.Array, size: int) -> jax.Array:
    """Returns chunks (b, n, size, ...) of x (b, t, ...), with zeros at the end."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], n, size, *x.shape[2:])


def unchunked(x: jax.Array, t: int) -> jax.Array:
    """Returns the rows (b, t, ...) of chunks (b, n, size, ...): the inverse of `chunked`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def with_previous(x: jax.Array) -> jax.Array:
    """Returns (b, n, 2 size, ...) of chunks (b, n, size, ...): the previous chunk (zeros at first), then the chunk."""
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
    return jnp.concatenate([before, x], axis=2)


def in_parts(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Returns function(arrays), a tree of (b, t, ...) arrays, `size` tokens at a time; tokens are independent."""
    t = jax.tree.leaves(arrays)[0].shape[1]
    if t <= size:
        return function(arrays)
    return jax.tree.map(lambda x: _from_parts(x, t), jax.lax.map(function, _to_parts(arrays, size)))


def in_parts_with_sums(
    step: Callable[[Any, Any], tuple[Any, jax.Array]], sums: Any, arrays: Any, size: int
) -> tuple[Any, jax.Array]:
    """Returns sums and results as `in_parts`, in order: step(sums, part) returns new sums and the part's result."""
    t = jax.tree.leaves(arrays)[0].shape[1]
    if t <= size:
        return step(sums, arrays)
    sums, out = jax.lax.scan(step, sums, _to_parts(arrays, size))
    return sums, _from_parts(out, t)


def compaction(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the order (b, t) that puts valid tokens (segment not 0) first in each row, and its inverse (b, t)."""
    # Counted: a TPU's compiler takes half a minute for a sort.
    valid = segments != 0
    before = jnp.cumsum(valid, axis=1) - valid
    place = jnp.where(valid, before, before[:, -1:] + valid[:, -1:] + jnp.cumsum(~valid, axis=1) - 1)
    rows, tokens = jnp.arange(segments.shape[0])[:, None], jnp.arange(segments.shape[1])
    return jnp.zeros_like(place).at[rows, place].set(tokens[None], unique_indices=True), place


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[index] row by row, of x (b, t, ...) at indices (b, n) within it."""
    return x.at[jnp.arange(x.shape[0])[:, None], index].get(mode="promise_in_bounds")


@jax.custom_vjp
def permuted(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns x with its tokens permuted: token i is x's token index[i], for a permutation (b, t) and its inverse.

    The gradient gathers too: a scatter is slow, and slow to compile.
    """
    return taken(x, index)


permuted.defvjp(
    lambda x, index, inverse: (taken(x, index), (index, inverse)),
    lambda saved, dy: (permuted(dy, saved[1], saved[0]), None, None),
)


def _to_parts(arrays: Any, size: int) -> Any:
    """Returns parts (parts, b, size, ...) of (b, t, ...), with zeros at the end."""
    return jax.tree.map(lambda x: jnp.moveaxis(chunked(x, size), 1, 0), arrays)


def _from_parts(x: jax.Array, t: int) -> jax.Array:
    return unchunked(jnp.moveaxis(x, 0, 1), t)
