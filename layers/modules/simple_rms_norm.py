"""SRMSNorm: RMS normalisation without a gain (Qin et al. 2023, TransNormerLLM, section 3.1.4)."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.norms import NormConfig


@chz.chz(typecheck=True)
class SRMSNorm(NormConfig):
    """x / sqrt(mean(x^2) + epsilon)."""

    epsilon: float = 1e-6

    def build(self, width: int) -> SimpleRMSNormalization:
        return SimpleRMSNormalization(self.epsilon)


class SimpleRMSNormalization(nnx.Module):
    """The module of `SRMSNorm`; it has no parameters."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        y = x.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)).astype(x.dtype)
