"""Adafactor: second moments of matrices kept as one row and one column."""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
import optax

from recollect.configuration import at_least, requires
from recollect.models.functional import FunctionalModel
from recollect.training.optimizer import Hyperparameters, Optimizer


@chz.chz(typecheck=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5) without momentum, with an absolute
    learning rate: the optimizer state of a matrix (n, m) is n + m numbers, which every device of a mesh keeps.

    Attributes:
      decay_power: the second moments' decay at step s is 1 - s^-decay_power.
      update_clip: largest root mean square of a parameter's update before the learning rate, in each layer.
      factored_from: smallest size of both dimensions from which on a matrix is factored; smaller ones keep all moments.
    """

    decay_power: float = chz.field(default=0.8, validator=requires(lambda value: value > 0, "must be positive"))
    update_clip: float = chz.field(default=1.0, validator=requires(lambda value: value > 0, "must be positive"))
    factored_from: int = chz.field(default=128, validator=at_least(1))

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        scale = optax.scale_by_factored_rms(decay_rate=self.decay_power, min_dim_size_to_factor=self.factored_from)
        dims = model.tags("dims")

        def clip(updates: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda update, letters: self._clipped(update, len(letters.split())), updates, dims)

        return optax.chain(scale, optax.stateless(clip))

    def _clipped(self, update: jax.Array, rank: int) -> jax.Array:
        """Returns an update whose last `rank` dimensions have a bounded root mean square; those before count layers."""
        axes = tuple(range(update.ndim - rank, update.ndim))
        size = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, size / self.update_clip)
