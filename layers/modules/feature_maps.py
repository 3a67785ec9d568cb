"""Feature maps for linear attention: phi with phi(q) . phi(k) in place of exp(q . k)."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import Config, requires
from recollect.layers.modules.linear import parameter
from recollect.pallas_kernels.taylor_attention import features as taylor_features


@chz.chz(typecheck=True)
class FeatureMap(Config):
    """Base of the feature maps. `build(heads, head_dim)` returns a module x (b, t, h, k) -> (b, t, h, features)."""

    def build(self, heads: int, head_dim: int) -> nnx.Module:
        """Returns the module of the map."""
        return Pointwise(self)

    def features(self, head_dim: int) -> int:
        """Returns the number of features per head."""
        return head_dim

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        """Returns the features of `x`, for maps without parameters."""
        raise NotImplementedError

    @property
    def positive(self) -> bool:
        """True when phi(q) . phi(k) >= 0 always, so that a normaliser makes sense."""
        return True


@chz.chz(typecheck=True)
class Identity(FeatureMap):
    """phi(x) = x / k^(1/4), so that the product carries softmax's 1/sqrt(k) (RetNet and others). It can be
    negative: no normaliser."""

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        return x * x.shape[-1] ** -0.25

    @property
    def positive(self) -> bool:
        return False


@chz.chz(typecheck=True)
class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, equation 7)."""

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        return jax.nn.elu(x) + 1


@chz.chz(typecheck=True)
class Relu(FeatureMap):
    """phi(x) = relu(x) + epsilon. With epsilon=0 a query can be orthogonal to every key; it then reads 0, since the
    mixer adds its own epsilon to the normaliser."""

    epsilon: float = chz.field(default=1e-6, validator=requires(lambda value: value >= 0, "must be 0 or more"))

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        return jax.nn.relu(x) + self.epsilon


@chz.chz(typecheck=True)
class Exp(FeatureMap):
    """phi(x) = exp(x) elementwise, not normalised; in fp32 it is finite up to |x| = 44 (a product of two must fit)."""

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        return jnp.exp(x)


@chz.chz(typecheck=True)
class Taylor(FeatureMap):
    """Second-order Taylor features of exp (Based, Arora et al. 2024, section 4.1): with s = q . k / sqrt(k),

        phi(q) . phi(k) = 1 + s + s^2 / 2 >= 1/2.

    The square is symmetric, so its upper triangle is enough: 153 features in place of 273 at k = 16, with the same
    products (recollect.pallas_kernels.taylor_attention.features, which states phi).
    """

    def features(self, head_dim: int) -> int:
        return taylor_features.count(head_dim)

    def apply(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        return taylor_features.packed(x)


@chz.chz(typecheck=True)
class Hedgehog(FeatureMap):
    """phi(x) = softmax([2 (W x + b), -2 (W x + b)]), W (k, k) per head, initialised to the identity (Zhang et
    al. 2024, section 4; the factor 2 and the softmax over both halves as in flash-linear-attention)."""

    def build(self, heads: int, head_dim: int) -> HedgehogFeatures:
        return HedgehogFeatures(heads, head_dim)

    def features(self, head_dim: int) -> int:
        return 2 * head_dim


class Pointwise(nnx.Module):
    """A feature map without parameters, computed in fp32."""

    def __init__(self, config: FeatureMap):
        self.config = config

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h features"]:
        return self.config.apply(x.astype(jnp.float32))


class HedgehogFeatures(nnx.Module):
    """Hedgehog's learned map, computed in fp32."""

    def __init__(self, heads: int, head_dim: int):
        self.kernel = parameter(jnp.broadcast_to(jnp.eye(head_dim), (heads, head_dim, head_dim)), "h k k")
        self.bias = parameter(jnp.zeros((heads, head_dim)), "h k", decay=False)

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h 2*k"]:
        y = 2 * (jnp.einsum("bthk,hkl->bthl", x.astype(jnp.float32), self.kernel[...]) + self.bias[...])
        return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1)
