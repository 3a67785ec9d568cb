"""Parameters and the linear map, following the input's dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Any
"""`initializer(key, shape, dtype)`, as in jax.nn.initializers."""


def normal(stddev: float = 0.02) -> Initializer:
    """N(0, stddev)."""
    return jax.nn.initializers.normal(stddev)


def output_init(depth: int) -> Initializer:
    """N(0, 0.02 / sqrt(2 depth)) for projections that write to the residual stream (Radford et al. 2019, section
    2.3)."""
    return normal(0.02 / (2 * depth) ** 0.5)


def parameter(value: jax.Array, *, decay: bool = True, group: str = "default", trainable: bool = True) -> nnx.Param:
    """An fp32 parameter with the tags the optimizer reads.

    Args:
      decay: whether weight decay applies (it can be forced on all parameters, see `AdamW.decay_everything`).
      group: name of its learning-rate group.
      trainable: False for constants that travel with the weights (a fixed decay a head, say).
    """
    return nnx.Param(value.astype(jnp.float32), decay=decay, group=group, trainable=trainable)


class Linear(nnx.Module):
    """y = x W + b, W (in, out): parameters fp32, computed in x's dtype."""

    def __init__(
        self, inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = False, init: Initializer | None = None
    ):
        self.kernel = parameter((init or normal())(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = parameter(jnp.zeros(outputs), decay=False) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
