"""Packed second-order Taylor features: phi(q) . phi(k) = 1 + s + s^2 / 2 with s = scale q . k.

phi(x) = [1, x_i / k^(1/4), x_i^2 / sqrt(2 k), x_i x_j / sqrt(k) for i < j], the pairs row by row: 1 + k + k (k + 1) / 2
numbers, 153 at k = 16 (Based, Arora et al. 2024, section 4.1; the square is symmetric, so its upper triangle is
enough). Queries are multiplied by scale sqrt(k) first: a state, which is made of keys, means the same at every scale.

Each feature is a product of two numbers that are linear in x, phi = (x left + left_one) * (x right + right_one), which
is how kernels
make them: two products with constant matrices, no gathers and nothing put together along lanes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


def count(key_dim: int) -> int:
    """How many features a vector of `key_dim` numbers has."""
    return 1 + key_dim + key_dim * (key_dim + 1) // 2


def query_factor(scale: float, key_dim: int) -> float:
    """What queries are multiplied by before the map."""
    return scale * key_dim**0.5


def packed(x: jax.Array) -> jax.Array:
    """Features (..., count(k)) of x (..., k), in x's dtype."""
    factors = selections(x.shape[-1], count(x.shape[-1]))
    left, right = (x @ jnp.asarray(matrix, x.dtype) for matrix in (factors.left, factors.right))
    return (left * jnp.asarray(factors.weight, x.dtype) + jnp.asarray(factors.left_one, x.dtype)) * (
        right + jnp.asarray(factors.right_one, x.dtype)
    )


@dataclasses.dataclass(frozen=True)
class Selections:
    """phi = (weight * (x left) + left_one) * (x right + right_one); left and right (k, features) hold zeros and
    ones, the rest (features,)."""

    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray
    left_one: np.ndarray
    right_one: np.ndarray


@functools.cache
def selections(key_dim: int, width: int) -> Selections:
    """The constants of phi, padded by features that are zero to `width` of them."""
    rows, columns = np.triu_indices(key_dim)
    features, first_pair = count(key_dim), 1 + key_dim
    left, right = np.zeros((2, key_dim, width))
    weight, left_one, right_one = np.zeros((3, width))
    left_one[0] = right_one[0] = 1
    left[np.arange(key_dim), 1 + np.arange(key_dim)] = 1
    weight[1:first_pair], right_one[1:first_pair] = key_dim**-0.25, 1
    pairs = np.arange(first_pair, features)
    left[rows, pairs] = right[columns, pairs] = 1
    weight[pairs] = np.where(rows == columns, (2 * key_dim) ** -0.5, key_dim**-0.5)
    return Selections(left, right, weight, left_one, right_one)
