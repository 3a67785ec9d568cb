"""Finds where a step stops being finite: the first activation going forward, the first gradient going back."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.batch import Batch
from recollect.layers.mixer import Context
from recollect.models.activations import activations
from recollect.models.functional import FunctionalModel, Params, flatten
from recollect.models.stack import Block
from recollect.training.loss import Loss, losses


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

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, JSON-ready."""
        return dataclasses.asdict(self)


def diagnose(
    model: FunctionalModel,
    params: Params,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    loss: Loss = Loss(),
    pieces: int = 1,
) -> Diagnosis:
    """Runs a step's forward pass layer by layer and its backward pass, and looks for what is not finite.

    Runs in the caller's precision and mesh (`with program.context():`).

    Args:
      params: of one model, stacked layers as in a train state.
      key: the step's dropout key; None for none.
      pieces: the batch is taken in so many pieces, as the step does with `run.accumulate`.
    """
    split = [jax.tree.map(lambda leaf, index=index: _piece(leaf, pieces, index), batch) for index in range(pieces)]
    keys = [key] if pieces == 1 else [None] * pieces if key is None else list(jax.random.split(key, pieces))
    total = jnp.maximum(jnp.sum(jnp.asarray(batch.weights)), 1.0)

    names, look = _compiled(model, loss, pieces)
    rows = [jax.device_get(look(params, piece, key, total)) for piece, key in zip(split, keys, strict=True)]
    largest = {name: float(max(row[0][index][0] for row in rows)) for index, name in enumerate(names)}
    broken = {name: int(sum(row[0][index][1] for row in rows)) for index, name in enumerate(names)}
    gradients = {name: sum(row[1][name] for row in rows) for name in rows[0][1]}
    found = jax.device_get(
        jax.jit(lambda params: {name: _broken(name, leaf) for name, leaf in flatten(params).items()})(params)
    )
    wrong_parameters, wrong_gradients = _in_order(model, found), _in_order(model, gradients)
    return Diagnosis(
        batch=_bad_field(batch, model.vocabulary),
        parameter=wrong_parameters[0] if wrong_parameters else None,
        activation=next((name for name in names if broken[name]), None),
        gradient=wrong_gradients[-1] if wrong_gradients else None,
        loss=float(sum(row[2] for row in rows)),
        largest=largest,
        broken=broken,
    )


@functools.lru_cache(maxsize=2)
def _compiled(model: FunctionalModel, loss: Loss, pieces: int) -> tuple[list[str], Any]:
    """Names of the parts (filled by tracing: a compiled function returns no strings, and sorts dicts), and the
    function that looks at them."""
    names: list[str] = []

    def look(params: Params, piece: Batch, key: jax.Array | None, weight: jax.Array) -> Any:
        parts = list(activations(model.bind(params), piece.tokens, Context(segments=piece.segments), key))
        names[:] = [name for name, _ in parts]

        def mean(params: Params) -> tuple[jax.Array, jax.Array]:
            entropy, out = losses(model.bind(params), piece, piece.weights, loss, key)
            total = entropy.total / weight + sum(out.losses.values(), jnp.zeros(())) / pieces
            return total, jnp.sum(entropy.loss * piece.weights) / weight

        grads, mean_loss = jax.grad(mean, has_aux=True)(params)
        broken = {name: _broken(name, leaf) for name, leaf in flatten(grads).items()}
        return [_health(x) for _, x in parts], broken, mean_loss

    return names, jax.jit(look)


def _piece(leaf: jax.Array, pieces: int, index: int) -> jax.Array:
    return leaf if pieces == 1 else leaf.reshape(pieces, -1, *leaf.shape[1:])[index]


def _health(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest finite absolute value, and how many values are not finite."""
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x)
    return jnp.max(jnp.where(finite, jnp.abs(x), 0)), jnp.sum(~finite)


def _broken(name: str, leaf: jax.Array) -> jax.Array:
    """How many values are not finite: (repeats,) for a stacked parameter, else ()."""
    wrong = ~jnp.isfinite(leaf)
    return jnp.sum(wrong, axis=tuple(range(1, leaf.ndim))) if name.startswith("stack.") else jnp.sum(wrong)


def _in_order(model: FunctionalModel, counts: dict[str, Any]) -> list[str]:
    """Names of the parameters that are not finite, in the order of the forward pass."""
    stages = model.config.stages
    first = np.cumsum([0, *(stage.depth for stage in stages)])
    wrong = []
    for name, count in counts.items():
        match = re.fullmatch(r"stack\.stages\.(\d+)\.(\d+)\.((\w+).*)", name)
        if match is None:
            place = {"final_norm": first[-1], "head": first[-1] + 1}.get(name.split(".")[0], -1)
            if count:
                wrong.append(((place, 0), name))
            continue
        stage, position = int(match[1]), int(match[2])
        kind = type(stages[stage].pattern[position]).__name__
        for repeat in np.flatnonzero(count):
            layer = int(first[stage] + repeat * len(stages[stage].pattern) + position)
            wrong.append(((layer, Block.PARTS.index(match[4])), f"layer {layer} {kind} {match[3]}"))
    return [name for _, name in sorted(wrong, key=lambda pair: pair[0])]


def _bad_field(batch: Batch, vocabulary: int) -> str | None:
    for name in ("tokens", "targets"):
        ids = getattr(batch, name)
        if bool(jnp.any((ids < 0) | (ids >= vocabulary))):
            return name
    return None if bool(jnp.isfinite(batch.weights).all()) else "weights"
