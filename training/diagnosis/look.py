"""Norms of activations, parameters and gradients, predictions beside labels, and accuracy by distance, of a run's
newest checkpoint on data that it is evaluated on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np

from recollect.data.batch import Batch
from recollect.models.activations import activations
from recollect.models.functional import Params, flatten
from recollect.training.checkpoint.load import open_run
from recollect.training.checkpoint.saved_data import with_tokenizer_of
from recollect.training.experiment import Experiment, Mesh
from recollect.training.loss import context_of
from recollect.training.step import program_for

ROWS = 64
"""Rows of the batch that is looked at, of a recall task 64 of each evaluated size."""
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the model, in the order of the forward pass.

    Attributes:
      name: "embedding", "layer 1 Attention mixer", "final norm", ...
      activation: root mean square of its output (of a mixer and an MLP: what they add to the stream); NaN for the head.
      parameter, gradient: norms of its parameters and of their gradient; 0 where it has none.
    """

    name: str
    activation: float
    parameter: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A labelled position: what stands before it (at most 12 tokens, the last one is the position's own), the label,
    the prediction, its probability, and how many tokens back the label last stood in the input; None: nowhere."""

    before: tuple[int, ...]
    label: int
    predicted: int
    probability: float
    distance: int | None


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen. `correct_by_distance`: right answers and answers by distance from the label's last place in the
    input, in powers of two: {8: (3, 4)} counts 5 to 8 tokens. `uniform_loss`: of a guess among all tokens, nats."""

    experiment: Experiment
    step: int
    parts: tuple[Part, ...]
    examples: tuple[Example, ...]
    accuracy: float
    loss: float
    uniform_loss: float
    correct_by_distance: dict[int, tuple[int, int]]
    tokenizer: Any


def look_into(path: Path, overrides: Sequence[str] = ()) -> Look:
    """Returns what the newest checkpoint of the run in `path` does on its (or overridden) evaluation data.

    Raises:
      UserError: there is no checkpoint, or it does not fit the overrides.
    """
    run = open_run(path, list(overrides))
    data: Any = with_tokenizer_of(run.data, run.experiment.data)
    batches = _batches(run.experiment, data)
    parts: dict[str, list[Part]] = {}
    examples: list[Example] = []
    totals: dict[int, tuple[int, int]] = {}
    losses, right, count = 0.0, 0, 0
    for batch in batches:
        alone = chz.replace(run.experiment.run, batch_size=len(batch.tokens), accumulate=1, mesh=Mesh())
        experiment = chz.replace(run.experiment, run=alone, data=data)
        for part in _parts(experiment, run.params, batch):
            parts.setdefault(part.name, []).append(part)
        predicted, probability, loss = _answers(experiment, run.params, batch)
        places = distances(batch)
        weights = np.asarray(batch.weights) > 0
        correct = (predicted == np.asarray(batch.targets)) & weights
        losses += float(loss[weights].sum())
        right += int(correct.sum())
        count += int(weights.sum())
        for bin_, (good, all_) in _by_distance(places, correct, weights).items():
            totals[bin_] = (totals.get(bin_, (0, 0))[0] + good, totals.get(bin_, (0, 0))[1] + all_)
        examples += _examples(batch, predicted, probability, places, -(-SHOWN // len(batches)))
    return Look(
        experiment=run.experiment,
        step=run.step,
        parts=tuple(_mean(members) for members in parts.values()),
        examples=tuple(examples[:SHOWN]),
        accuracy=right / max(count, 1),
        loss=losses / max(count, 1),
        uniform_loss=math.log(run.vocabulary),
        correct_by_distance=dict(sorted(totals.items())),
        tokenizer=run.data.tokenizer,
    )


def distances(batch: Batch) -> np.ndarray:
    """Returns for each labelled position how many tokens back its label last stood in the input, (b, p); 0: nowhere
    before it."""
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
    length = tokens.shape[1]
    positions = np.arange(length)[None] if batch.target_positions is None else np.asarray(batch.target_positions)
    positions = np.broadcast_to(positions, targets.shape)
    back = np.zeros(targets.shape, np.int64)
    for row in range(len(tokens)):
        last: dict[int, int] = {}
        order = np.argsort(positions[row], kind="stable")
        seen = 0
        for index in order:
            while seen <= positions[row, index]:
                last[int(tokens[row, seen])] = seen
                seen += 1
            place = last.get(int(targets[row, index]))
            back[row, index] = 0 if place is None else positions[row, index] + 1 - place
    return back


def _batches(experiment: Experiment, data: Any) -> list[Batch]:
    """Returns the batches that are looked at: of a recall task one for each evaluated size, else one of held-out
    text."""
    if data.made_on_device:
        seed = experiment.run.seed
        return [jax.device_get(data.evaluation_batch(seed, 0, part, ROWS)) for part in data.evaluation_slices()]
    return [next(data.evaluation_batches(min(ROWS, experiment.run.batch_size)))]


def _parts(experiment: Experiment, params: Params, batch: Batch) -> list[Part]:
    """Returns activations, parameters and gradients of each part on a batch."""
    program = program_for(experiment)

    @jax.jit
    def look(params: Params, batch: Batch) -> Any:
        outputs = activations(program.model.bind(params), batch.tokens, context_of(batch))
        rms = OrderedDict((name, jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))) for name, x in outputs)
        gradients, _ = program.gradients(params, batch, None)
        squares = [{name: _squares(name, leaf) for name, leaf in flatten(tree).items()} for tree in (params, gradients)]
        return rms, squares

    with program.context():
        rms, (parameters, gradients) = jax.device_get(look(params, jax.tree.map(jnp.asarray, batch)))
    sums = {name: [0.0, 0.0] for name in [*rms, "head"]}
    for column, squares in enumerate((parameters, gradients)):
        for name, values in squares.items():
            for part, value in _owners(experiment, name, values):
                sums.setdefault(part, [0.0, 0.0])[column] += float(value)
    return [
        Part(name, float(rms.get(name, math.nan)), *map(math.sqrt, pair))
        for name, pair in sums.items()
        if name in rms or pair[0]
    ]


def _squares(name: str, leaf: jax.Array) -> jax.Array:
    """Returns the sum of squares: of a stacked parameter one for each repeat."""
    axes = tuple(range(1 if name.startswith("stack.") else 0, leaf.ndim))
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)


def _owners(experiment: Experiment, name: str, values: Any) -> list[tuple[str, float]]:
    """Returns the part that a parameter belongs to, with its sum of squares: a part for each repeat of a stage."""
    stages = experiment.model.stages
    match = re.fullmatch(r"stack\.stages\.(\d+)\.(\d+)\.(\w+?)(_norm)?\..*", name)
    if match is None:
        return [(name.split(".")[0].replace("_", " "), float(np.sum(values)))]
    stage, position = int(match[1]), int(match[2])
    first, pattern = sum(before.depth for before in stages[:stage]), stages[stage].pattern
    kind = type(pattern[position]).__name__
    return [
        (f"layer {first + repeat * len(pattern) + position} {kind} {match[3]}", float(value))
        for repeat, value in enumerate(np.atleast_1d(values))
    ]


def _answers(experiment: Experiment, params: Params, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each labelled position the most likely token, its probability, and the label's loss."""
    program = program_for(experiment)

    @jax.jit
    def answer(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        module = program.model.bind(params)
        hidden = module.hidden(batch.tokens, context_of(batch)).hidden
        if batch.target_positions is not None:
            hidden = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
        log_shares = jax.nn.log_softmax(module.logits(hidden))
        label = jnp.take_along_axis(log_shares, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.argmax(log_shares, axis=-1), jnp.exp(jnp.max(log_shares, axis=-1)), -label

    with program.context():
        return jax.device_get(answer(params, jax.tree.map(jnp.asarray, batch)))


def _by_distance(places: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> dict[int, tuple[int, int]]:
    bins = 2 ** np.ceil(np.log2(np.maximum(places, 1))).astype(int)
    counted = weights & (places > 0)
    return {
        int(bin_): (int(correct[counted & (bins == bin_)].sum()), int((counted & (bins == bin_)).sum()))
        for bin_ in np.unique(bins[counted])
    }


def _examples(
    batch: Batch, predicted: np.ndarray, probability: np.ndarray, places: np.ndarray, count: int
) -> list[Example]:
    """Returns the last labelled position of each of the first rows."""
    examples = []
    for row in range(min(count, len(predicted))):
        labelled = np.flatnonzero(np.asarray(batch.weights)[row] > 0)
        if not len(labelled):
            continue
        positions = batch.target_positions
        index = int(labelled[-1] if positions is None else max(labelled, key=lambda one: positions[row, one]))
        position = index if positions is None else int(positions[row, index])
        before = np.asarray(batch.tokens)[row, max(0, position - 11) : position + 1]
        examples.append(
            Example(
                before=tuple(map(int, before)),
                label=int(np.asarray(batch.targets)[row, index]),
                predicted=int(predicted[row, index]),
                probability=float(probability[row, index]),
                distance=int(places[row, index]) or None,
            )
        )
    return examples


def _mean(parts: list[Part]) -> Part:
    """Returns the root mean square over batches."""
    fields = ("activation", "parameter", "gradient")
    values = {name: float(np.sqrt(np.mean([getattr(part, name) ** 2 for part in parts]))) for name in fields}
    return Part(parts[0].name, **values)
