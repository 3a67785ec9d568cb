"""Positions as a bias of attention's scores, by the distance of query and key, per head."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, at_least
from recollect.layers.modules.decays import alibi_slopes
from recollect.layers.modules.linear import normal, parameter
from recollect.layers.modules.positions import Placement, PositionsConfig


@chz.chz(typecheck=True)
class ScoreBias(PositionsConfig):
    """Base of biases of scores."""

    @abc.abstractmethod
    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> DistanceBias:
        """Returns the bias of a mixer's scores."""


@chz.chz(typecheck=True)
class Alibi(ScoreBias):
    """-slope_h (i - j), with fixed slopes: 2^(-8 h / heads), h = 1, 2, ... (Press, Smith & Lewis 2021, section 3; where
    heads is no power of two, the slopes of their code)."""

    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> DistanceBias:
        """Returns the module: it has no parameters."""
        return DistanceBias(heads)


@chz.chz(typecheck=True)
class RelativeBias(ScoreBias):
    """table[bucket(i - j), h], learned (Raffel et al. 2020, T5, section 2.1): half of the buckets hold one distance
    each, the others up to `distance` grow with its logarithm, and the last holds all from there on. At the start
    N(0, 1/sqrt(width)), as in the public port. (T5 divides scores by nothing; here they are over sqrt(k).)"""

    buckets: int = chz.field(default=32, validator=at_least(2))
    distance: int = chz.field(default=128, validator=at_least(1))

    @chz.validate
    def _reaches(self) -> None:
        if self.distance <= self.buckets // 2:
            half = f"the {self.buckets // 2} distances that have a bucket of their own (buckets // 2)"
            raise UserError(f"distance={self.distance}: must be above {half}")

    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> BucketBias:
        """Returns the module with its table."""
        return BucketBias(self, heads, width, rngs)

    def bucket_of(self) -> np.ndarray:
        """Returns the bucket of each distance from 0 to `distance`, which stands for all above."""
        exact = self.buckets // 2
        d = np.arange(self.distance + 1)
        grown = np.log(np.maximum(d, exact) / exact) / np.log(self.distance / exact) * (self.buckets - exact)
        return np.where(d < exact, d, np.minimum(exact + (grown + 1e-9).astype(int), self.buckets - 1))


class DistanceBias(nnx.Module, Placement):
    """The module of `Alibi`; base of biases by distance."""

    def __init__(self, heads: int):
        self.heads = heads

    def of_distance(self, distance: Int[Array, "b t s"]) -> Float[Array, "b h t s"]:
        """Returns the bias, fp32; distances are 0 or more."""
        slopes = jnp.asarray(alibi_slopes(self.heads), jnp.float32)
        return -slopes[:, None, None] * distance[:, None].astype(jnp.float32)

    def bias(self, q: Float[Array, "b t h k"], k: Float[Array, "b s g k"], fields: Mapping[str, Any]) -> jax.Array:
        """Returns what is added to scores, (b or 1, h, t, s)."""
        return self.of_distance(jnp.abs(distances(q, k, fields)))  # of later keys too, where a query sees them


class BucketBias(DistanceBias):
    """The module of `RelativeBias`."""

    def __init__(self, config: RelativeBias, heads: int, width: int, rngs: nnx.Rngs):
        super().__init__(heads)
        self.config = config
        init = normal(width**-0.5)
        self.buckets = parameter(init(rngs.params(), (config.buckets, heads), jnp.float32), "e h", decay=False)

    def of_distance(self, distance: Int[Array, "b t s"]) -> Float[Array, "b h t s"]:
        by_distance = self.buckets[...][self.config.bucket_of()]
        return jnp.moveaxis(by_distance[jnp.clip(distance, 0, self.config.distance)], -1, 1)


def distances(
    q: Float[Array, "b t h k"], k: Float[Array, "b s g k"], fields: Mapping[str, Any]
) -> Int[Array, "#b t s"]:
    """Returns how many positions each key stands before each query, from query_positions and key_positions of `fields`
    (without the latter those of queries; None: 0, 1, ...)."""
    i = fields["query_positions"]
    j = fields.get("key_positions", i)
    i, j = (jnp.arange(x.shape[1])[None] if at is None else at for x, at in ((q, i), (k, j)))
    return i[:, :, None] - j[:, None, :]
