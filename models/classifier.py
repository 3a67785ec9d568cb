"""A head for sequences: one prediction per row, from its tokens' vectors taken together."""

from __future__ import annotations

from typing import Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import Config, at_least
from recollect.layers.modules.linear import Linear
from recollect.layers.packing import last_valid


@chz.chz(typecheck=True)
class Classifier(Config):
    """Classes of whole rows, in place of a prediction per token: `Batch.targets` is (b, 1). Rows hold one document.

    Attributes:
      classes: number of them.
      pool: what stands for a row: the "mean" over its tokens, or its "first" or "last" token. Padding is none.
    """

    classes: int = chz.field(validator=at_least(2))
    pool: Literal["mean", "first", "last"] = "mean"

    def build(self, width: int, rngs: nnx.Rngs) -> ClassifierModule:
        """Returns the module for a model of this width."""
        return ClassifierModule(self, width, rngs)


class ClassifierModule(nnx.Module):
    """The module of `Classifier`."""

    def __init__(self, config: Classifier, width: int, rngs: nnx.Rngs):
        self.pool = config.pool
        self.head = Linear(width, config.classes, "d r", rngs)

    def __call__(self, x: Float[Array, "b t d"], segments: Int[Array, "b t"] | None) -> Float[Array, "b 1 d"]:
        """Returns what the head takes of each row; zeros where a row is all padding."""
        if segments is None:
            segments = jnp.ones(x.shape[:2], jnp.int32)
        real = (segments != 0)[..., None]
        if self.pool == "mean":
            total = jnp.sum(jnp.where(real, x, 0).astype(jnp.float32), axis=1, keepdims=True)
            return (total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)).astype(x.dtype)
        if self.pool == "first":
            x, segments = x[:, ::-1], segments[:, ::-1]
        return last_valid(x, segments, jnp.zeros_like(x[:, 0]))[:, None]
