"""The base of normalisations over the last axis, and layer norm; statistics in fp32, output in the input's dtype."""

from __future__ import annotations

import abc

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import Config
from recollect.layers.modules.linear import parameter


@chz.chz(typecheck=True)
class NormConfig(Config):
    """Base of the norms' configs; `epsilon` is added to the variance."""

    epsilon: float = 1e-5

    @abc.abstractmethod
    def build(self, width: int) -> nnx.Module:
        """Returns the norm over vectors of this width."""


@chz.chz(typecheck=True)
class LayerNorm(NormConfig):
    """(x - mean(x)) / sqrt(var(x) + epsilon) * gain + bias (Ba, Kiros & Hinton 2016)."""

    bias: bool = True

    def build(self, width: int) -> LayerNormalization:
        return LayerNormalization(width, self.epsilon, self.bias)


class LayerNormalization(nnx.Module):
    """The module of `LayerNorm`."""

    def __init__(self, width: int, epsilon: float = 1e-5, bias: bool = True):
        self.gain = parameter(jnp.ones(width), "d")
        self.bias = parameter(jnp.zeros(width), "d") if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon) * self.gain[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
