"""Finds where a step stops being finite: the first activation going forward, the first gradient going back."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.batch import Batch
from recollect.models.activations import activations
from recollect.models.functional import Params, flatten
from recollect.training.experiment import Experiment
from recollect.training.loss import context_of
from recollect.training.step import Program, program_for

BLOCK = ("mixer_norm", "mixer", "mlp_norm", "mlp")
"""Attributes of `models.Block` that hold parameters, in the order of the forward pass."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. The names are None where all is finite.

    Attributes:
      batch: the field of the batch that holds what it must not.
      parameter: the first parameter, in the order of the forward pass, that is not finite.
      activation: the first part whose activations are not finite ("layer 3 LinearAttention mixer").
      gradient: the first parameter, in the order of the backward pass, whose gradient is not finite.
      loss: mean over the labelled positions, without auxiliary losses.
      largest: absolute value of the largest finite activation, part by part.
      broken: number of activations that are not finite, part by part.
    """

    batch: str | None
    parameter: str | None
    activation: str | None
    gradient: str | None
    loss: float
    largest: dict[str, float]
    broken: dict[str, int]

    @property
    def finite(self) -> bool:
        """Whether everything is finite."""
        return bool(np.isfinite(self.loss)) and not any((self.batch, self.parameter, self.activation, self.gradient))

    def sentence(self) -> str:
        """Returns what broke first, in words."""
        if self.finite:
            return "every number is finite"
        parts = [
            f"the batch's {self.batch}" if self.batch else "",
            f"the parameter {self.parameter}" if self.parameter else "",
            f"first broken activations: {self.activation}" if self.activation else "all activations are finite",
            f"first broken gradient: {self.gradient}" if self.gradient else "all gradients are finite",
        ]
        return f"loss {self.loss:.6g}; not finite: " + "; ".join(part for part in parts if part)


def diagnose(experiment: Experiment, params: Params, batch: Batch, step: int) -> Diagnosis:
    """Runs a step's forward pass layer by layer and its backward pass, and looks for what is not finite.

    It runs as the step does: with its loss and dropout, in its precision and mesh, and in `run.accumulate` parts.

    Args:
      params: those that the step was taken from.
      batch: the whole batch of that step.
      step: how many steps came before it.
    """
    program = program_for(experiment)
    with program.context():
        key = program.dropout_key(jnp.uint32(experiment.run.seed), step)
        parts, parameters, gradients, loss = jax.device_get(_look(program, params, batch, key))
    wrong_parameters, wrong_gradients = (_in_order(experiment, counts) for counts in (parameters, gradients))
    broken = {name: int(np.sum(counts)) for name, (_, counts) in parts.items()}
    return Diagnosis(
        batch=_bad_field(batch, program.model.vocabulary),
        parameter=wrong_parameters[0] if wrong_parameters else None,
        activation=next((name for name, count in broken.items() if count), None),
        gradient=wrong_gradients[-1] if wrong_gradients else None,
        loss=float(loss),
        largest={name: float(np.max(sizes)) for name, (sizes, _) in parts.items()},
        broken=broken,
    )


@functools.partial(jax.jit, static_argnums=0)
def _look(program: Program, params: Params, batch: Batch, key: jax.Array | None) -> Any:
    """Returns of each part of the model, in order, the largest finite activation and how many are not finite (for each
    piece of the batch), then `_broken` of parameters and gradients, and the loss."""
    count = program.experiment.run.accumulate

    def activations_of(piece: Any) -> OrderedDict[str, tuple[jax.Array, jax.Array]]:
        batch, key = piece
        outputs = activations(program.model.bind(params), batch.tokens, context_of(batch, key))
        return OrderedDict((name, _health(x)) for name, x in outputs)  # jax keeps its order, and sorts a dict

    pieces = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    keys = key if key is None else key[None] if count == 1 else jax.random.split(key, count)
    gradients, metrics = program.gradients(params, batch, key)
    return jax.lax.map(activations_of, (pieces, keys)), _broken(params), _broken(gradients), metrics["loss"]


def _health(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest finite absolute value, and how many values are not finite."""
    finite = jnp.isfinite(x)
    return jnp.max(jnp.where(finite, jnp.abs(x), 0)).astype(jnp.float32), jnp.sum(~finite)


def _broken(params: Params) -> dict[str, jax.Array]:
    """Returns how many values of each parameter are not finite: (repeats,) for a stacked one, else ()."""
    wrong = {name: ~jnp.isfinite(leaf) for name, leaf in flatten(params).items()}
    kept = {name: 1 if name.startswith("stack.") else 0 for name in wrong}
    return {name: jnp.sum(leaf, axis=tuple(range(kept[name], leaf.ndim))) for name, leaf in wrong.items()}


def _in_order(experiment: Experiment, counts: dict[str, Any]) -> list[str]:
    """Returns the names of the parameters that are not finite, in the order of the forward pass."""
    stages = experiment.model.stages
    first = np.cumsum([0, *(stage.depth for stage in stages)])
    wrong = []
    for name, count in counts.items():
        match = re.fullmatch(r"stack\.stages\.(\d+)\.(\d+)\.((\w+).*)", name)
        for repeat in np.flatnonzero(count):
            if match is None:
                layer = {"final_norm": first[-1], "head": first[-1] + 1}.get(name.split(".")[0], -1)
                wrong.append((layer, 0, name))
            else:
                pattern, position = stages[int(match[1])].pattern, int(match[2])
                layer = first[int(match[1])] + repeat * len(pattern) + position
                shown = f"layer {layer} {type(pattern[position]).__name__} {match[3]}"
                wrong.append((layer, BLOCK.index(match[4]), shown))
    return [name for *_, name in sorted(wrong, key=lambda row: row[:2])]


def _bad_field(batch: Batch, vocabulary: int) -> str | None:
    for name in ("tokens", "targets"):
        ids = getattr(batch, name)
        if bool(jnp.any((ids < 0) | (ids >= vocabulary))):
            return name
    return None if bool(jnp.isfinite(batch.weights).all()) else "weights"
