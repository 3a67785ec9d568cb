"""Feature maps for linear attention: phi with phi(q) . phi(k) in place of exp(q . k)."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recollect.configuration import Config, UserError
from recollect.layers.modules.linear import parameter


@chz.chz(typecheck=True)
class FeatureMap(Config):
    """Base of the feature maps. `build(heads, head_dim)` gives a module x (b, t, h, k) -> (b, t, h, features)."""

    def build(self, heads: int, head_dim: int) -> nnx.Module:
        return Pointwise(self)

    def features(self, head_dim: int) -> int:
        """How many features a head's vector becomes."""
        return head_dim

    def apply(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    @property
    def positive(self) -> bool:
        """Whether phi(q) . phi(k) >= 0 always, so that a normaliser makes sense."""
        return True


@chz.chz(typecheck=True)
class Identity(FeatureMap):
    """phi(x) = x / k^(1/4), so that the product carries softmax's 1/sqrt(k) (RetNet and its kin). Its sign is free:
    no normaliser."""

    def apply(self, x: jax.Array) -> jax.Array:
        return x * x.shape[-1] ** -0.25

    @property
    def positive(self) -> bool:
        return False


@chz.chz(typecheck=True)
class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, equation 7)."""

    def apply(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x) + 1


@chz.chz(typecheck=True)
class Relu(FeatureMap):
    """phi(x) = relu(x) + epsilon. Without epsilon a query can be orthogonal to every key, and the normaliser zero."""

    epsilon: float = 1e-6

    @chz.validate
    def _positive(self) -> None:
        if self.epsilon <= 0:
            raise UserError(f"epsilon={self.epsilon}: relu features need a positive epsilon")

    def apply(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x) + self.epsilon


@chz.chz(typecheck=True)
class Exp(FeatureMap):
    """phi(x) = exp(x), a feature apiece, not normalised; in fp32 it holds to |x| = 44 (a product of two must fit)."""

    def apply(self, x: jax.Array) -> jax.Array:
        return jnp.exp(x)


@chz.chz(typecheck=True)
class Taylor(FeatureMap):
    """Second-order Taylor features of exp (Based, Arora et al. 2024, section 4.1): with s = q . k / sqrt(k),

        phi(q) . phi(k) = 1 + s + s^2 / 2 >= 1/2.

    phi(x) = [1, x / k^(1/4), x_i^2 / sqrt(2 k), x_i x_j / sqrt(k) for i < j]: the square is symmetric, so its upper
    triangle is enough, 1 + k + k (k + 1) / 2 features in place of 1 + k + k^2 (153 in place of 273 at k = 16), with the
    same products.
    """

    def features(self, head_dim: int) -> int:
        return 1 + head_dim + head_dim * (head_dim + 1) // 2

    def apply(self, x: jax.Array) -> jax.Array:
        k = x.shape[-1]
        rows, columns = np.triu_indices(k)
        weights = np.where(rows == columns, (2 * k) ** -0.5, k**-0.5).astype(np.float32)
        # Selection as products with one-hot matrices: gathers along the lane are slow on every backend, in the gradient
        # above all.
        select = np.eye(k, dtype=np.float32)
        pairs = (x @ jnp.asarray(select[:, rows] * weights)) * (x @ jnp.asarray(select[:, columns]))
        return jnp.concatenate([jnp.ones_like(x[..., :1]), x * k**-0.25, pairs], axis=-1)


@chz.chz(typecheck=True)
class Hedgehog(FeatureMap):
    """phi(x) = softmax([2 (W x + b), -2 (W x + b)]), W (k, k) a head, started at the identity (Zhang et al. 2024,
    section 4; the factor 2 and the softmax over both halves are flash-linear-attention's form)."""

    def build(self, heads: int, head_dim: int) -> HedgehogFeatures:
        return HedgehogFeatures(heads, head_dim)

    def features(self, head_dim: int) -> int:
        return 2 * head_dim


class Pointwise(nnx.Module):
    """A feature map without parameters, computed in fp32."""

    def __init__(self, config: FeatureMap):
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.config.apply(x.astype(jnp.float32))


class HedgehogFeatures(nnx.Module):
    """Hedgehog's learned map, x (b, t, h, k) to (b, t, h, 2 k) fp32."""

    def __init__(self, heads: int, head_dim: int):
        self.kernel = parameter(jnp.broadcast_to(jnp.eye(head_dim), (heads, head_dim, head_dim)))
        self.bias = parameter(jnp.zeros((heads, head_dim)), decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = 2 * (jnp.einsum("bthk,hkl->bthl", x.astype(jnp.float32), self.kernel[...]) + self.bias[...])
        return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1)
