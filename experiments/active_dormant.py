"""Heads that rest on the first token, over training (Guo et al., Active-Dormant Attention Heads, arXiv 2410.13835).

On Bigram-Backcopy attention has work at triggers alone. Elsewhere it learns to give its weight to the first token (a
sink), whose value shrinks (a drain); in three layers trained by Adam its vector in the residual stream grows (a peak).

    python -m recollect.experiments.active_dormant runs/active_dormant           # two cores: one layer of width 64
    python -m recollect.experiments.active_dormant runs/active_dormant --full    # the paper's size, for a GPU

Each variant's checkpoints are measured (`curves.csv`) and drawn. A run that is there already goes on, or is only
measured. MLPs have GELU here (ReLU there), and the chain is drawn (`data.corpus=FILE` counts one of a text, as there).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import chz
import jax
import jax.numpy as jnp
import numpy as np

from recollect.configuration.console import exit_code
from recollect.configuration.io import replacing
from recollect.data.batch import Batch
from recollect.data.synthetics import BigramBackcopy
from recollect.evaluation.plots.style import figure
from recollect.layers import Attention, Context, GatedAttention, SoftmaxConfig
from recollect.layers.modules import ACTIVE_DORMANT, GELU, LayerNorm, LearnedPositions
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.functional import Params
from recollect.training.checkpoint.load import load_params
from recollect.training.checkpoint.orbax_folder import Checkpoints
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW, Optimizer
from recollect.training.sgd import SGD
from recollect.training.train import train

ADAMW = AdamW(learning_rate=3e-4, beta2=0.99, weight_decay=1e-4, schedule="constant")
VARIANTS = {
    "softmax": "Bigram-Backcopy with softmax attention and AdamW, one layer.",
    "gated": "Bigram-Backcopy with an output gate behind attention and AdamW, one layer.",
    "sgd": "Bigram-Backcopy with softmax attention and SGD with momentum, one layer.",
}
"""Name and docstring of the experiments, which experiments/registry.py reads without running this file."""

_SETTINGS: dict[str, tuple[SoftmaxConfig, Optimizer]] = {
    "softmax": (Attention(), ADAMW),
    "gated": (GatedAttention(), ADAMW),
    "sgd": (Attention(), SGD(learning_rate=0.03, weight_decay=1e-4, schedule="constant")),
}


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a checkpoint does on held-out sequences.

    Attributes:
      step: of the checkpoint.
      backcopy_risk, bigram_risk: cross-entropy at triggers and elsewhere, less what the chain's own probabilities have
        there, nats.
      attention: weight of the first token, a mean over later queries that are no triggers, in the layer where it is
        largest.
      value: norm of the first token's value there over the mean norm of the others.
      residual: norm of the first token's vector after the first layer over the mean norm of the others.
    """

    step: int
    backcopy_risk: float
    bigram_risk: float
    attention: float
    value: float
    residual: float


def variant(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS, at its size for two cores."""
    return _experiment(name, layers=1, width=64, data=BigramBackcopy(length=64, extrapolation=()), batch=64, steps=2000)


def full(name: str) -> Experiment:
    """Returns the experiment of a name in VARIANTS at the paper's size (not yet run here)."""
    data = BigramBackcopy(extrapolation=())
    return _experiment(name, layers=3, width=256, data=data, batch=512, steps=10_000)


def _experiment(name: str, *, layers: int, width: int, data: BigramBackcopy, batch: int, steps: int) -> Experiment:
    mixer, optimizer = _SETTINGS[name]
    if layers == 1:
        optimizer = chz.replace(optimizer, learning_rate=10 * optimizer.learning_rate)  # a tenth of the steps
    model = LanguageModel(
        width=width,
        stages=repeat(mixer, depth=layers),
        norm=LayerNorm(),
        mlp=GELU(expansion=4),
        positions=LearnedPositions(maximum=data.length),
        tied=False,
        initialisation=ACTIVE_DORMANT,
    )
    every = steps // 20
    run = Run(
        steps=steps,
        batch_size=batch,
        steps_per_call=every // 2,
        evaluate_every=steps // 4,
        checkpoint_every=every,
        keep_every=every,
    )
    return Experiment(name=f"active_dormant.{name}", model=model, data=data, optimizer=optimizer, run=run)


def measures(model: FunctionalModel, task: BigramBackcopy, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Returns risks, and an array by layer of each other measure (see `Measures`), of one batch. Layers are
    softmax attention of one head without positions of their own."""
    module = model.bind(params)
    tokens, is_trigger = batch.tokens, jnp.asarray(batch.groups) > 0
    x, context, _ = module.enter(tokens, Context())
    later = jnp.triu(jnp.ones((tokens.shape[1],) * 2, bool), 1)
    resting = ~is_trigger & (jnp.arange(tokens.shape[1]) > 0)
    layers: dict[str, list[jax.Array]] = {"attention": [], "value": [], "residual": []}
    for block in module.stack.layers():
        normed = block.mixer_norm(x)
        mixer: Any = block.mixer
        q, k, v = (of(normed) for of in (mixer.query, mixer.key, mixer.value))
        scores = jnp.einsum("btk,bsk->bts", q, k) / jnp.sqrt(q.shape[-1])
        weight = jax.nn.softmax(jnp.where(later, -jnp.inf, scores))[..., 0]
        layers["attention"].append(jnp.sum(weight * resting) / jnp.sum(resting))
        layers["value"].append(_of_first(v))
        x = x + mixer(normed, context).hidden
        x = x + block.mlp(block.mlp_norm(x))
        layers["residual"].append(_of_first(x))
    log_shares = jax.nn.log_softmax(module.logits(module.leave(x, None)))
    loss = -jnp.take_along_axis(log_shares, batch.targets[..., None], axis=-1)[..., 0]
    after, unigram = task.chain()
    start = np.where(np.isin(np.arange(len(unigram)), task.trigger_tokens()), 0, unigram)
    chain = jnp.asarray(np.concatenate([after, start[None] / start.sum()]), jnp.float32)
    excess = loss + jnp.where(is_trigger, 0, jnp.log(chain[tokens, batch.targets]))
    risks = {
        name: jnp.sum(excess * kind) / jnp.sum(kind)
        for name, kind in {"backcopy_risk": is_trigger, "bigram_risk": ~is_trigger}.items()
    }
    return risks | {name: jnp.stack(by_layer) for name, by_layer in layers.items()}


def _of_first(vectors: jax.Array) -> jax.Array:
    """Returns the norm of the first vectors of rows over the mean norm of the others."""
    norms = jnp.linalg.norm(vectors, axis=-1)
    return jnp.mean(norms[:, 0]) / jnp.mean(norms[:, 1:])


def curves(experiment: Experiment, rows: int = 64) -> list[Measures]:
    """Trains an experiment in its folder as far as it is not trained, and returns the measures of its checkpoints."""
    train(experiment)
    folder = Path(str(experiment.run.directory)) / "checkpoints"
    task: Any = experiment.data
    model = FunctionalModel(experiment.model, task.vocabulary)
    batch = task.evaluation_batch(experiment.run.seed, 0, None, rows)
    program = jax.jit(functools.partial(measures, model, task))
    found = []
    for step in Checkpoints(folder).steps():
        values: dict[str, Any] = jax.device_get(program(load_params(folder, step=step)[0], batch))
        layer = int(np.argmax(values["attention"]))
        values |= {"attention": values["attention"][layer], "value": values["value"][layer]}
        values["residual"] = values["residual"][0]
        found.append(Measures(step, **{name: float(value) for name, value in values.items()}))
    return found


def write(out: Path, found: Mapping[str, Sequence[Measures]]) -> None:
    """Writes curves.csv and a figure per measure, of curves by variant."""
    names = [field.name for field in dataclasses.fields(Measures)]
    with replacing(out / "curves.csv") as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", *names])
        writer.writerows([name, *dataclasses.astuple(one)] for name, measures in found.items() for one in measures)
    for measure in names[1:]:
        with figure(out / f"{measure}.png", 2.4) as axes:
            for name, measures in found.items():
                axes.plot([one.step for one in measures], [getattr(one, measure) for one in measures], label=name)
            axes.set_xlabel("Step")
            axes.set_ylabel(_AXES[measure])


_AXES = {
    "backcopy_risk": "Excess loss at triggers (nats)",
    "bigram_risk": "Excess loss elsewhere (nats)",
    "attention": "Weight of the first token",
    "value": "Norm of its value / others'",
    "residual": "Norm of its vector / others'",
}


def main() -> int:
    """Trains, measures and draws all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="at the paper's size")
    parser.add_argument("--only", action="append", choices=list(VARIANTS))
    options = parser.parse_args()
    found = {}
    for name in options.only or VARIANTS:
        experiment = full(name) if options.full else variant(name)
        run = chz.replace(experiment.run, directory=str(options.out / name))
        found[name] = curves(chz.replace(experiment, run=run))
        print(name, found[name][-1], flush=True)
    write(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
