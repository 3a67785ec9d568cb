"""AdamW with the published settings as options, and what all optimizers share.

Numbers that can differ between members of a population (learning rate, weight decay, betas, epsilon, momentum) come as
traced scalars, so that one compiled program serves every value.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
import optax

from recollect.configuration import Config, UserError, requires
from recollect.models.functional import FunctionalModel
from recollect.training.parameter_groups import GroupRate, scaled_by_group
from recollect.training.trained_part import trained_part

Hyperparameters = dict[str, Any]

positive = requires(lambda value: 0 < value < float("inf"), "must be positive and finite")
_not_negative = requires(lambda value: 0 <= value < float("inf"), "must not be negative, and finite")
below_one = requires(lambda value: 0 <= value < 1, "must be in [0, 1)")
_share = requires(lambda value: 0 < value <= 1, "the share of the steps that decay must be above 0, at most 1")
_steps = requires(lambda value: 1 <= value < 2**31, f"must be at least 1 and at most {2**31 - 1}")
_norm = requires(lambda value: value > 0, "must be positive, or None for no clipping")
_decay = requires(lambda value: 0 < value < 1, "must be between 0 and 1 (0.999, say), or None for no average")


@chz.chz(typecheck=True)
class Optimizer(Config):
    """Base of the optimizers: what they share.

    Attributes:
      learning_rate: its peak.
      schedule: "cosine" and "linear" fall from the peak to `final_fraction` of it at the last step; "constant" stays;
        "wsd" (warmup, stable, decay: Hu et al. 2024, MiniCPM, section 4.2) stays, then falls linearly over the last
        `decay_share` of the steps.
      decay_steps: the schedule's length; None: run.steps. A run may end before it, or go on at the last rate.
      warmup: steps of linear rise to the peak.
      weight_decay: decoupled, scaled by the learning rate (as in PyTorch and optax).
      decay_everything: decay all parameters (Zoology), else those tagged for it (matrices, not norms and biases).
      clip: largest global norm of the gradient; None does not clip.
      groups: learning-rate factors by parameter group (Hyena's filters are tagged "filter").
      ema: decay of a running average of the parameters, which evaluation, generation and export then use; None keeps
        none. Its first steps average less far back: the decay at step s is at most (1 + s) / (10 + s).
      frozen: names of parameters that are not trained, with * and ?, separated by commas ("embedding,stack.*"): no
        gradient step, no weight decay, no optimizer state.
    """

    learning_rate: float = chz.field(default=1e-3, validator=positive)
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    final_fraction: float = chz.field(default=0.0, validator=_not_negative)
    decay_share: float = chz.field(default=0.2, validator=_share)
    decay_steps: int | None = chz.field(default=None, validator=_steps)
    warmup: int = chz.field(default=0, validator=_not_negative)
    weight_decay: float = chz.field(default=0.1, validator=_not_negative)
    decay_everything: bool = False
    clip: float | None = chz.field(default=None, validator=_norm)
    groups: tuple[GroupRate, ...] = ()
    ema: float | None = chz.field(default=None, validator=_decay)
    frozen: str | tuple[str, ...] | None = None

    VALUES: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay")
    """Fields that a population may vary without a new program."""

    @chz.validate
    def _warmup_fits(self) -> None:
        if self.decay_steps is not None and self.warmup > self.decay_steps:
            raise UserError(f"optimizer.warmup={self.warmup}: must be at most optimizer.decay_steps={self.decay_steps}")

    def values(self) -> Hyperparameters:
        """Returns the numbers that a population may vary."""
        return {name: getattr(self, name) for name in self.VALUES}

    def rate(self, step: jax.Array, steps: int, learning_rate: jax.Array) -> jax.Array:
        """Returns the learning rate at `step` of a run of `steps`."""
        steps = self.decay_steps or steps
        step = jnp.asarray(step, jnp.float32)
        if self.schedule == "constant":
            shape = jnp.ones(())
        else:
            first = steps * (1 - self.decay_share) if self.schedule == "wsd" else self.warmup
            progress = jnp.clip((step - first) / max(1, steps - first), 0, 1)
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if self.schedule == "cosine" else 1 - progress
            shape = self.final_fraction + (1 - self.final_fraction) * left
        return learning_rate * shape * (jnp.minimum(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)

    def averaged(self, average: Any, params: Any, step: jax.Array) -> Any:
        """Returns the running average after `step`, which made `params`. To be called when `ema` is set."""
        assert self.ema is not None
        share = 1 - jnp.minimum(self.ema, (1 + step) / (10 + step))
        return jax.tree.map(lambda old, new: old + share * (new - old), average, params)

    def transform(self, model: FunctionalModel, steps: int, values: Hyperparameters) -> optax.GradientTransformation:
        """Returns the optax transformation for `model`; `values` may be traced."""
        if not all(jax.tree.leaves(model.tags("trainable"))):
            return trained_part(lambda part: self.transform(part, steps, values), model)
        decayed = None if self.decay_everything else model.tags("decay")
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip is not None else []
        parts.append(self.direction(model, values))
        parts.append(optax.add_decayed_weights(values["weight_decay"], mask=decayed))
        if self.groups:
            parts.append(scaled_by_group(model, self.groups))
        parts.append(optax.scale_by_learning_rate(lambda step: self.rate(step, steps, values["learning_rate"])))
        return optax.chain(*parts)

    @abc.abstractmethod
    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        """Returns the transformation from gradients to the update that the learning rate scales."""


@chz.chz(typecheck=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2).

    Attributes:
      beta1, beta2, epsilon: Adam's.
    """

    beta1: float = chz.field(default=0.9, validator=below_one)
    beta2: float = chz.field(default=0.999, validator=below_one)
    epsilon: float = chz.field(default=1e-8, validator=positive)

    VALUES: ClassVar[tuple[str, ...]] = (*Optimizer.VALUES, "beta1", "beta2", "epsilon")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=values["beta1"], b2=values["beta2"], eps=values["epsilon"])
