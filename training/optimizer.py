"""AdamW and Muon with the published settings as options.

Numbers that can differ between members of a population (learning rate, weight decay, betas, epsilon, momentum) come as
traced scalars, so that one compiled program serves every value.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
import optax

from recollect.configuration import Config, UserError
from recollect.models.functional import FunctionalModel, flatten

Hyperparameters = dict[str, Any]


@chz.chz(typecheck=True)
class GroupRate(Config):
    """Parameters tagged with `group` learn at `factor` times the learning rate."""

    group: str
    factor: float


@chz.chz(typecheck=True)
class Optimizer(Config):
    """What all optimizers share.

    Attributes:
      learning_rate: at its highest.
      schedule: "cosine" and "linear" fall from there, each step, to `final_fraction` of it at the last step; "constant"
        stays; "wsd" (warmup, stable, decay: Hu et al. 2024, MiniCPM, section 4.2) stays, then falls on a line over the
        last `decay_share` of the steps.
      warmup: steps of linear rise before that.
      weight_decay: decoupled, scaled by the learning rate (as in PyTorch and optax).
      decay_everything: decay all parameters (Zoology), else those tagged for it (matrices, not norms and biases).
      beta1, beta2, epsilon: Adam's.
      clip: largest global norm of the gradient; None leaves it.
      groups: learning-rate factors by parameter group (Hyena's filters are tagged "filter").
      ema: decay of a running average of the parameters, which evaluation, generation and export then use; None keeps
        none. Its first steps average less far back: the decay at step s is at most (1 + s) / (10 + s).
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    final_fraction: float = 0.0
    decay_share: float = 0.2
    warmup: int = 0
    weight_decay: float = 0.1
    decay_everything: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = None
    groups: tuple[GroupRate, ...] = ()
    ema: float | None = None

    VALUES: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon")
    """Fields that a population may vary without a new program."""

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
        if not 0 < self.decay_share <= 1:
            raise UserError(
                f"decay_share={self.decay_share}: the share of the steps that decay must be above 0, at most 1"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema={self.ema}: must be between 0 and 1 (0.999, say), or None for no average")

    def values(self) -> Hyperparameters:
        """The numbers that a population may vary."""
        return {name: getattr(self, name) for name in self.VALUES}

    def rate(self, step: jax.Array, steps: int, learning_rate: jax.Array) -> jax.Array:
        """The learning rate at `step` of `steps`."""
        step = jnp.asarray(step, jnp.float32)
        if self.schedule == "constant":
            shape = jnp.ones(())
        else:
            first = steps * (1 - self.decay_share) if self.schedule == "wsd" else self.warmup
            progress = jnp.clip((step - first) / max(1, steps - first), 0, 1)
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if self.schedule == "cosine" else 1 - progress
            shape = self.final_fraction + (1 - self.final_fraction) * left
        rise = jnp.minimum(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return learning_rate * shape * rise

    def averaged(self, average: Any, params: Any, step: jax.Array) -> Any:
        """The running average after `step`, which made `params`. To be called when `ema` is set."""
        assert self.ema is not None
        step = jnp.asarray(step, jnp.float32)
        share = 1 - jnp.minimum(self.ema, (1 + step) / (10 + step))
        return jax.tree.map(lambda old, new: old + share * (new - old), average, params)

    def transform(self, model: FunctionalModel, steps: int, values: Hyperparameters) -> optax.GradientTransformation:
        """The optax transformation for `model`; `values` may be traced.

        Raises:
          UserError: `groups` names a group that no parameter of the model has.
        """
        decayed = None if self.decay_everything else model.tags("decay")
        parts = [optax.clip_by_global_norm(self.clip)] if self.clip is not None else []
        parts.append(self.direction(model, values))
        parts.append(optax.add_decayed_weights(values["weight_decay"], mask=decayed))
        if self.groups:
            parts.append(self._grouped(model))
        parts.append(optax.scale_by_learning_rate(lambda step: self.rate(step, steps, values["learning_rate"])))
        trainable = model.tags("trainable")
        if not all(jax.tree.leaves(trainable)):
            parts.append(optax.masked(optax.set_to_zero(), jax.tree.map(lambda tag: not tag, trainable)))
        return optax.chain(*parts)

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        """From gradients to the update that the learning rate scales.

        Raises:
          UserError: this is the base class, which has none.
        """
        raise UserError(
            f"optimizer={type(self).__name__} is what all optimizers share, not one; there are AdamW and Muon"
        )

    def _grouped(self, model: FunctionalModel) -> optax.GradientTransformation:
        factors = {group.group: group.factor for group in self.groups}
        tags = model.tags("group")
        unknown = set(factors) - set(jax.tree.leaves(tags))
        if unknown:
            known = ", ".join(sorted(set(jax.tree.leaves(tags))))
            raise UserError(
                f"optimizer.groups names {', '.join(sorted(unknown))}; this model's parameter groups are {known}"
            )

        def scale(updates: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda update, tag: update * factors.get(tag, 1.0), updates, tags)

        return optax.stateless(scale)


def _adam(values: Hyperparameters) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=values["beta1"], b2=values["beta2"], eps=values["epsilon"])


@chz.chz(typecheck=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2). Its fields are those of `Optimizer`."""

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        return _adam(values)


@chz.chz(typecheck=True)
class Muon(Optimizer):
    """Muon (Jordan et al. 2024): the momentum of each matrix of the layers is made orthogonal, by Newton-Schulz, before
    it is a step.

    Matrices are the kernels of linear maps in the stack, each layer's (and each head's, where a head has one) by
    itself. Embedding, head, norms, biases, convolutions' taps, routers and long filters take AdamW's step. Steps of
    matrices are scaled by `matrix_rms` sqrt(max(inputs, outputs)), so that their root mean square is about AdamW's and
    both share a learning rate and a weight decay (Liu et al. 2025, Muon is scalable, section 2.2).

    Attributes:
      momentum: of the matrices' gradients, Nesterov's.
      iterations: of Newton-Schulz.
      matrix_rms: see above.
    """

    momentum: float = 0.95
    iterations: int = 5
    matrix_rms: float = 0.2

    VALUES: ClassVar[tuple[str, ...]] = (*Optimizer.VALUES, "momentum")

    @chz.validate
    def _muon_ranges(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: must be in [0, 1)")
        if self.iterations < 1:
            raise UserError(f"iterations={self.iterations}: must be at least 1 (5 is usual)")
        if not self.matrix_rms > 0:
            raise UserError(f"matrix_rms={self.matrix_rms}: must be positive")

    def direction(self, model: FunctionalModel, values: Hyperparameters) -> optax.GradientTransformation:
        def places(updates: Any) -> Any:
            return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

        def scale(updates: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda update: update * (self.matrix_rms * max(update.shape[-2:]) ** 0.5), updates)

        muon = optax.contrib.scale_by_muon(
            ns_steps=self.iterations, beta=values["momentum"], weight_dimension_numbers=places
        )
        return optax.partition(
            {"matrix": optax.chain(muon, optax.stateless(scale)), "other": _adam(values)}, self.labels(model)
        )

    def labels(self, model: FunctionalModel) -> Any:
        """ "matrix" or "other" for every parameter."""
        groups, trainable = flatten(model.tags("group")), flatten(model.tags("trainable"))

        def label(path: tuple[Any, ...], _: Any) -> str:
            name = ".".join(str(entry.key) for entry in path)
            matrix = (
                re.search(r"^stack\..*(?<!_router)\.kernel$", name) and groups[name] == "default" and trainable[name]
            )
            return "matrix" if matrix else "other"

        return jax.tree_util.tree_map_with_path(label, model.tags("group"))
