"""Every recall task, one atlas: mixers on tasks, each at several learning rates and seeds.

Setting of the small studies, mqar.small's: a convolution of width 3, then the mixer, no MLP, no positions; width 32,
batch 64, 800 steps, sequences of about 32 tokens, AdamW with weight decay 0.1 on everything and a cosine to 0. Every
task is also evaluated at twice its size, beside the mean.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import chz

from recollect.data import synthetics
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
    mad,
    ruler,
)
from recollect.data.synthetics.mad import MAD
from recollect.data.synthetics.ruler import RULER
from recollect.experiments import field, mqar
from recollect.experiments.orderings import Ordering
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
from recollect.training.experiment import Experiment, Run
from recollect.training.optimizer import AdamW

EVALUATED: dict[str, Any] = {"extrapolation": (2,), "evaluation_examples": 512}

TASKS: dict[str, SyntheticTask] = {
    "mqar": MQAR(vocab_size=128, length=32, pairs=4, **EVALUATED),
    "copying": Copying(symbols=16, fewest=4, most=15, **EVALUATED),
    "induction": InductionHeads(vocab_size=16, length=32, **EVALUATED),
    "parity": StateTracking(group="Z2", length=32, **EVALUATED),
    "forgetting": ForgettingMQAR(vocab_size=128, length=32, pairs=4, **EVALUATED),
    "selective": SelectiveCopying(vocab_size=16, length=32, copies=8, **EVALUATED),
    "stacks": Stacks(stacks=2, symbols=16, operations=11, **EVALUATED),
    "hops": Depo(nodes=8, hops=2, symbols=16, **EVALUATED),
}
"""The tasks of the small studies by name, the four of `tiny` first."""

EXPECTED = (
    Ordering("mqar", "attention", "convolution", 0.3, "it mixes by place, not by content; Zoology"),
    Ordering("mqar", "attention", "window", 0.1, "it answers what is in reach"),
    Ordering("parity", "gated_delta_net_negative", "gated_delta_net", 0.2, "eigenvalues of -1; Grazzi et al. 2024"),
)

RATE, SEED = "optimizer.learning_rate", "run.seed"
SMALL = Run(steps=800, batch_size=64, steps_per_call=50, evaluate_every=200, checkpoint_every=800)
LARGE = Run(steps=5000, batch_size=64, steps_per_call=100, evaluate_every=1000, checkpoint_every=5000)

Mixers = Callable[[int], Mapping[str, MixerConfig]]
"""Mixers by name, for sequences of a length in tokens."""


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


def every_mixer(length: int) -> dict[str, MixerConfig]:
    """Returns the mixers of mqar.py, field.py and the small studies by name, sized for sequences of `length` tokens."""
    sizes = {"maximum_length": length, "levels": (length - 1).bit_length() + 1}
    known = {**mixers(length), **mqar.mixers(length, window=17), **field.MIXERS}
    return {
        name: chz.replace(mixer, **{size: value for size, value in sizes.items() if size in chz.chz_fields(mixer)})
        for name, mixer in known.items()
    }


def every_task() -> dict[str, SyntheticTask]:
    """Returns every recall task by name at its default size, those of RULER and MAD by their published names, and
    state tracking of five groups."""
    groups = {name: StateTracking(group=group) for name, group in zip(_GROUPS, _GROUPS.values(), strict=True)}
    published = {**{f"ruler_{name}": ruler(name) for name in RULER}, **{f"mad_{name}": mad(name) for name in MAD}}
    return {**dict(_by_class()), **groups, **published}


_GROUPS = {"parity": "Z2", "z60": "Z60", "a4_z5": "A4xZ5", "a5": "A5", "s5": "S5"}


def _by_class() -> Iterator[tuple[str, SyntheticTask]]:
    for name in synthetics.__all__:
        cls = getattr(synthetics, name)
        is_task = isinstance(cls, type) and issubclass(cls, SyntheticTask) and not inspect.isabstract(cls)
        if is_task and cls is not StateTracking and cls.pattern == "causal self":
            yield re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), cls()


def _setting(task: str, data: SyntheticTask, name: str, mixer: MixerConfig, width: int, run: Run) -> Experiment:
    stages = repeat(BaseConvolution(kernel=3), mixer, depth=2)
    model = LanguageModel(width=width, stages=stages, norm=LayerNorm(), mlp=None)
    optimizer = AdamW(learning_rate=3e-3, weight_decay=0.1, decay_everything=True)
    return Experiment(name=name, task=task, model=model, data=data, optimizer=optimizer, run=run)


def _study(
    tasks: Mapping[str, SyntheticTask],
    mixers: Mixers,
    rates: Sequence[float],
    seeds: int,
    *,
    count: int | None = None,
    width: int = 32,
    run: Run = SMALL,
) -> Study:
    """Returns the study of the first `count` mixers on tasks."""
    return Study(
        experiments=tuple(
            _setting(task, data, name, mixer, width, run)
            for task, data in tasks.items()
            for name, mixer in list(mixers(data.longest).items())[:count]
        ),
        sweep=grid({RATE: rates, SEED: range(seeds)}),
        template=lambda label, mixer: tuple(
            _setting(task, data, label, mixer, width, run) for task, data in tasks.items()
        ),
        expects=EXPECTED,
    )


def tiny() -> Study:
    """Six mixers on four tasks at two learning rates, one seed: 48 runs (meant for two cores; it prints its time).

    python main.py compare atlas.tiny
    """
    return _study(dict(list(TASKS.items())[:4]), mixers, (3e-3, 1e-2), 1, count=6)


def small() -> Study:
    """Twelve mixers on eight tasks at three learning rates x three seeds: 864 runs (it prints its time).

    python main.py compare atlas.small
    """
    return _study(TASKS, mixers, (1e-3, 3e-3, 1e-2), 3)


def full() -> Study:
    """Every mixer on every task at four learning rates x five seeds, width 128, 5,000 steps (meant for a GPU; it prints
    its time; not yet run).

    python main.py compare atlas.full
    """
    return _study(every_task(), every_mixer, (3e-4, 1e-3, 3e-3, 1e-2), 5, width=128, run=LARGE)


def attention() -> Study:
    """Which of the small studies' tasks two layers learn, a convolution and attention, at three learning rates.

    python main.py compare atlas.attention
    """
    return _study(TASKS, mixers, (1e-3, 3e-3, 1e-2), 1, count=1)
