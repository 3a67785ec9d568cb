"""Attention transfer: the feature maps of linear attention learn to mix as the softmax attention that they replace.

    loss = mean over the replaced layers of  |linear(x) - softmax(x)|^2 / |softmax(x)|^2

x is what the layer takes in the model of softmax attention, so that layers are trained apart, side by side; projections
stay as they are, only the maps are trained. Zhang et al. 2024, "LoLCATs", section 3.1, with the feature maps of
Hedgehog (Zhang et al. 2024, "The Hedgehog & the Porcupine", section 4), which trains them on the attention weights.

Easy to get wrong: outputs are compared after the last projection, relative to their own size, so that one learning rate
serves layers of any scale; a map that starts as the identity has a gradient only where queries and keys differ from 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.data.batch import Batch
from recollect.layers.convolved import streaming
from recollect.layers.mixer import Context
from recollect.layers.recurrent import Stream
from recollect.models.adaptation import nested
from recollect.models.functional import FunctionalModel, Params
from recollect.models.language_model import LanguageModelModule
from recollect.training.batches import open_batches
from recollect.training.experiment import Experiment
from recollect.training.step import Program, program_for

FEATURE_MAPS = ("query_features", "key_features")


def transferred(
    teacher: Params, before: Experiment, student: Params, after: Experiment, *, steps: int, learning_rate: float = 1e-2
) -> tuple[Params, list[float]]:
    """Returns the student's parameters (numpy) with its feature maps trained, and the loss of every step.

    Args:
      teacher, before: parameters and experiment of softmax attention, whose training batches are taken.
      student, after: of `models.conversion.converted`.
      learning_rate: of Adam.

    Raises:
      UserError: no layer of the student has feature maps with parameters.
    """
    flat = flatten(student)
    maps = {name: leaf for name, leaf in flat.items() if set(name.split(".")) & set(FEATURE_MAPS)}
    if not maps:
        raise UserError("attention transfer trains feature maps, and no layer of this model has any: Hedgehog() has")
    program = program_for(before)
    batch_of, optimizer = _batches(before, program), optax.adam(learning_rate)
    models = program.model, FunctionalModel(after.model, program.model.vocabulary)

    @jax.jit
    def step(maps: Params, state: Any, teacher: Params, rest: Params, batch: Batch) -> tuple[Params, Any, jax.Array]:
        def loss_of(maps: Params) -> jax.Array:
            return transfer_loss(models[0].bind(teacher), models[1].bind(nested(rest | maps)), batch)

        loss, gradient = jax.value_and_grad(loss_of)(maps)
        updates, state = optimizer.update(gradient, state)
        return jax.tree.map(jnp.add, maps, updates), state, loss

    losses: list[jax.Array] = []
    teacher, rest, state = jax.device_put((teacher, flat, optimizer.init(maps)))
    with program.context():
        for number in range(steps):
            maps, state, loss = step(maps, state, teacher, rest, batch_of(number))
            losses.append(loss)
    return nested(flat | jax.device_get(maps)), [float(loss) for loss in losses]


def _batches(experiment: Experiment, program: Program) -> Callable[[int], Batch]:
    """Returns the function that gives the training batch of a step; a task's are drawn by a compiled program."""
    data: Any = experiment.data
    run, batches = experiment.run, open_batches(experiment, program)
    if not data.made_on_device:
        return lambda step: batches.batch(step, run.seed)

    def drawn(step: int) -> Batch:
        part = data.slice_for(0, step // run.steps_per_call)
        draw = functools.partial(data.train_batch, slice=part, batch_size=run.batch_size)
        return program.jit(("batch", part), draw)(np.uint32(run.seed), np.int32(step))

    return drawn


def transfer_loss(teacher: LanguageModelModule, student: LanguageModelModule, batch: Batch) -> Float[Array, ""]:
    """Returns the loss over those layers of the student whose mixers have feature maps."""
    x, context, _ = teacher.enter(batch.tokens, Context(segments=batch.segments))
    losses = []
    for block, other in zip(teacher.stack.layers(), student.stack.layers(), strict=True):
        if hasattr(other.mixer, FEATURE_MAPS[0]):
            with streaming(Stream(context)):
                inputs = block.mixer_norm(x)
                aim, mixed = (mixer(inputs, context).hidden for mixer in (block.mixer, other.mixer))
            losses.append(jnp.sum(jnp.square(mixed - aim)) / jnp.sum(jnp.square(aim)))
        x = block(x, context).hidden
    return jnp.mean(jnp.stack(losses))
