"""AdamW with the published settings as options.

Numbers that can differ between members of a population (learning rate, weight decay, betas, epsilon) come as traced scalars, so
that one compiled program serves every value.
"""

from __future__ import annotations

from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
import optax

from configuration import Config, UserError
from models.functional import FunctionalModel

Hyperparameters = dict[str, Any]

VALUE_FIELDS = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon")
"""Fields of AdamW that a population may vary without a new program."""


@chz.chz(typecheck=True)
class GroupRate(Config):
    """Parameters tagged with `group` learn at `factor` times the learning rate."""

    group: str
    factor: float


@chz.chz(typecheck=True)
class AdamW(Config):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2).

    Attributes:
      learning_rate: at its highest.
      schedule: "cosine" falls from there, each step, to `final_fraction` of it at the last step; "constant" stays.
      warmup: steps of linear rise before that.
      weight_decay: decoupled, scaled by the learning rate (as in PyTorch and optax).
      decay_everything: decay all parameters (Zoology), else those tagged for it (matrices, not norms and biases).
      clip: largest global norm of the gradient; None leaves it.
      groups: learning-rate factors by parameter group (Hyena's filters are tagged "filter").
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.1
    decay_everything: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = None
    groups: tuple[GroupRate, ...] = ()

    @chz.validate
    def _ranges(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("weight_decay", "final_fraction", "warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"clip={self.clip}: must be positive, or None for no clipping")

    def values(self) -> Hyperparameters:
        """The numbers that a population may vary."""
        return {name: getattr(self, name) for name in VALUE_FIELDS}

    def rate(self, step: jax.Array, steps: int, learning_rate: jax.Array) -> jax.Array:
        """The learning rate at `step` of `steps`."""
        step = jnp.asarray(step, jnp.float32)
        if self.schedule == "constant":
            shape = jnp.ones(())
        else:
            progress = jnp.clip((step - self.warmup) / max(1, steps - self.warmup), 0, 1)
            shape = self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        rise = jnp.minimum(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return learning_rate * shape * rise

    def transform(self, model: FunctionalModel, steps: int, values: Hyperparameters) -> optax.GradientTransformation:
        """The optax transformation for `model`; `values` may be traced.

        Raises:
          UserError: `groups` names a group that no parameter of the model has.
        """
        decayed = None if self.decay_everything else model.tags("decay")
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip is not None else []
        parts.append(optax.scale_by_adam(b1=values["beta1"], b2=values["beta2"], eps=values["epsilon"]))
        parts.append(optax.add_decayed_weights(values["weight_decay"], mask=decayed))
        if self.groups:
            parts.append(self._grouped(model))
        parts.append(optax.scale_by_learning_rate(lambda step: self.rate(step, steps, values["learning_rate"])))
        trainable = model.tags("trainable")
        if not all(jax.tree.leaves(trainable)):
            parts.append(optax.masked(optax.set_to_zero(), jax.tree.map(lambda tag: not tag, trainable)))
        return optax.chain(*parts)

    def _grouped(self, model: FunctionalModel) -> optax.GradientTransformation:
        factors = {group.group: group.factor for group in self.groups}
        tags = model.tags("group")
        unknown = set(factors) - set(jax.tree.leaves(tags))
        if unknown:
            known = ", ".join(sorted(set(jax.tree.leaves(tags))))
            raise UserError(f"optimizer.groups names {', '.join(sorted(unknown))}; this model's parameter groups are {known}")

        def scale(updates: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda update, tag: update * factors.get(tag, 1.0), updates, tags)

        return optax.stateless(scale)
