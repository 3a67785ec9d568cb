"""Root-mean-square norm; layer norm is in layer_norm.py. Statistics in fp32, output in the input's dtype."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.layer_norm import LayerNorm, LayerNormalization, NormConfig
from recollect.layers.modules.linear import parameter


@chz.chz(typecheck=True)
class RMSNorm(NormConfig):
    """x / sqrt(mean(x^2) + epsilon) * gain (Zhang & Sennrich 2019, equation 4)."""

    epsilon: float = 1e-6

    def build(self, width: int) -> RMSNormalization:
        return RMSNormalization(width, self.epsilon)


class RMSNormalization(nnx.Module):
    """The module of `RMSNorm`."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.gain = parameter(jnp.ones(width), "d")
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.gain[...]).astype(x.dtype)


__all__ = ["LayerNorm", "LayerNormalization", "NormConfig", "RMSNorm", "RMSNormalization"]
