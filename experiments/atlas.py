"""Every recall task, one atlas: mixers on tasks, each at several learning rates and seeds.

Setting of the small studies, mqar.small's: a convolution of width 3, then the mixer, no MLP, no positions; width 32,
batch 64, 800 steps, sequences of about 32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chz

from recollect.data.synthetics import (
    MQAR,
    Copying,
    Depo,
    ForgettingMQAR,
    InductionHeads,
    SelectiveCopying,
    Stacks,
    StateTracking,
    SyntheticTask,
)
from recollect.experiments import mqar
from recollect.experiments.study import Study, grid
from recollect.layers import (
    MLSTM,
    RWKV7,
    BaseConvolution,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    Mamba2,
    Retention,
)
from recollect.layers.mixer import MixerConfig
from recollect.layers.modules import LayerNorm
from recollect.models import LanguageModel, repeat
from recollect.training.experiment import Experiment
from recollect.training.optimizer import AdamW

SEEN: dict[str, Any] = {"extrapolation": (2,), "evaluation_examples": 512}
"""Of every task here: one slice twice as hard is reported beside the mean."""

TASKS: dict[str, SyntheticTask] = {
    "mqar": MQAR(vocab_size=128, length=32, pairs=4, **SEEN),
    "copying": Copying(symbols=16, fewest=4, most=15, **SEEN),
    "induction": InductionHeads(vocab_size=16, length=32, **SEEN),
    "parity": StateTracking(group="Z2", length=32, **SEEN),
    "forgetting": ForgettingMQAR(vocab_size=128, length=32, pairs=4, **SEEN),
    "selective": SelectiveCopying(vocab_size=16, length=32, copies=8, **SEEN),
    "stacks": Stacks(stacks=2, symbols=16, operations=11, **SEEN),
    "hops": Depo(nodes=8, hops=2, symbols=16, **SEEN),
}
"""The tasks of the small studies by name, the four of `tiny` first."""

SCHEDULE = chz.replace(mqar.SCHEDULE, steps=800, evaluate_every=200, checkpoint_every=800)


def mixers(length: int) -> dict[str, MixerConfig]:
    """Returns the mixers of the small studies by name, the six of `tiny` first, for sequences of `length` tokens."""
    recall = mqar.mixers(length, window=9)
    return {
        **{name: recall[name] for name in ("attention", "window", "convolution")},
        "mamba2": Mamba2(key_dim=16),
        "gated_delta_net": GatedDeltaNet(),
        "gated_delta_net_negative": GatedDeltaNet(negative_eigenvalues=True),
        "based": recall["based"],
        "retention": Retention(heads=2, value_dim=16),
        "gla": GatedLinearAttention(heads=2, key_dim=16, kernel=4),
        "mlstm": MLSTM(heads=2, key_dim=16),
        "kimi_delta_attention": KimiDeltaAttention(),
        "rwkv7": RWKV7(),
    }


def _on(task: str, name: str, mixer: MixerConfig) -> Experiment:
    stages = repeat(BaseConvolution(kernel=3), mixer, depth=2)
    model = LanguageModel(width=32, stages=stages, norm=LayerNorm(), mlp=None)
    optimizer = AdamW(learning_rate=3e-3, weight_decay=0.1, decay_everything=True)
    return Experiment(name=name, task=task, model=model, data=TASKS[task], optimizer=optimizer, run=SCHEDULE)


def _study(count: int, tasks: int, axes: Mapping[str, tuple[Any, ...]]) -> Study:
    """Returns the study of the first `count` mixers on the first `tasks` tasks."""
    names = list(TASKS)[:tasks]
    experiments = [
        _on(task, name, mixer) for task in names for name, mixer in list(mixers(TASKS[task].longest).items())[:count]
    ]
    return Study(
        experiments=tuple(experiments),
        sweep=grid(dict(axes)),
        template=lambda label, mixer: tuple(_on(task, label, mixer) for task in names),
    )


def tiny() -> Study:
    """Six mixers on four tasks at two learning rates, one seed.

    python main.py compare atlas.tiny
    """
    return _study(6, 4, {"optimizer.learning_rate": (3e-3, 1e-2)})


def small() -> Study:
    """Twelve mixers on eight tasks at three learning rates x three seeds.

    python main.py compare atlas.small
    """
    return _study(12, 8, {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2), "run.seed": (0, 1, 2)})
