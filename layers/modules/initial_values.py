"""Initialisers beside jax's, for published initial values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Initializer


def torch_uniform(scale: float = 1.0) -> Initializer:
    """Returns torch's default for linear maps, times `scale`: uniform on (-1/sqrt(inputs), 1/sqrt(inputs))."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "..."]:
        return uniform(scale * shape[0] ** -0.5)(key, shape, dtype)

    return init


def uniform(bound: float) -> Initializer:
    """Returns the initialiser uniform on (-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def orthogonal(gain: float = 1.0) -> Initializer:
    """Returns matrices with orthonormal rows or columns, times `gain` (torch.nn.init.orthogonal_)."""
    return jax.nn.initializers.orthogonal(gain)


zeros = jax.nn.initializers.zeros
