"""Rows of tokens (b, t, ...) cut into chunks, put together again, and compacted: what several operations' plain
forms do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def chunked(x: jax.Array, size: int) -> jax.Array:
    """(b, t, ...) to (b, n, size, ...), zeros at the end."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, n * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], n, size, *x.shape[2:])


def unchunked(x: jax.Array, t: int) -> jax.Array:
    """Chunks (b, n, size, ...) to (b, t, ...): the inverse of `chunked`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def with_previous(x: jax.Array) -> jax.Array:
    """Chunks (b, n, size, ...) to (b, n, 2 size, ...): the chunk before (zeros before the first), then the chunk."""
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
    return jnp.concatenate([before, x], axis=2)


def in_parts(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """function of a tree of (b, t, ...) arrays, `size` of t at a time; of results (b, t, ...), each independent of
    the others."""
    t = jax.tree.leaves(arrays)[0].shape[1]
    if t <= size:
        return function(arrays)
    return jax.tree.map(lambda x: _from_parts(x, t), jax.lax.map(function, _to_parts(arrays, size)))


def in_parts_with_sums(
    step: Callable[[Any, Any], tuple[Any, jax.Array]], sums: Any, arrays: Any, size: int
) -> tuple[Any, jax.Array]:
    """As `in_parts`, one part after another: step(sums, part) returns the sums after it and the part's result."""
    t = jax.tree.leaves(arrays)[0].shape[1]
    if t <= size:
        return step(sums, arrays)
    sums, out = jax.lax.scan(step, sums, _to_parts(arrays, size))
    return sums, _from_parts(out, t)


def compaction(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row the storage order (b, t) with valid tokens (segment not 0) first, as they come, and where each token
    then stands (b, t)."""
    # Counted: a TPU's compiler takes half a minute for a sort.
    valid = segments != 0
    before = jnp.cumsum(valid, axis=1) - valid
    place = jnp.where(valid, before, before[:, -1:] + valid[:, -1:] + jnp.cumsum(~valid, axis=1) - 1)
    rows, tokens = jnp.arange(segments.shape[0])[:, None], jnp.arange(segments.shape[1])
    return jnp.zeros_like(place).at[rows, place].set(tokens[None], unique_indices=True), place


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Row by row x[index] of x (b, t, ...) for indices (b, n) within it."""
    return x.at[jnp.arange(x.shape[0])[:, None], index].get(mode="promise_in_bounds")


@jax.custom_vjp
def permuted(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Token i of a row is x's token index[i], for a permutation (b, t) and its inverse. The gradient gathers too: a
    scatter is slow, and slow to compile."""
    return taken(x, index)


permuted.defvjp(
    lambda x, index, inverse: (taken(x, index), (index, inverse)),
    lambda saved, dy: (permuted(dy, saved[1], saved[0]), None, None),
)


def _to_parts(arrays: Any, size: int) -> Any:
    """(b, t, ...) to (parts, b, size, ...), zeros at the end."""
    return jax.tree.map(lambda x: jnp.moveaxis(chunked(x, size), 1, 0), arrays)


def _from_parts(x: jax.Array, t: int) -> jax.Array:
    return unchunked(jnp.moveaxis(x, 0, 1), t)
