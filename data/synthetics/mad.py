"""MAD's six tasks by name, with the published baselines, sweeps and score.

    for name in MAD:
        for change, task in mad_settings(name): ...      # train on each; `mad_score` of the accuracies

Source: Poli et al., Mechanistic Design and Scaling of Hybrid Architectures (arXiv 2403.17844), appendix; settings of
athms/mad-lab, configs/tasks. Compression is for `models.Autoencoder`, which decodes the input from the last token's
vector alone; the other five are for language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from recollect.configuration import UserError
from recollect.data.synthetics.compression import Compression
from recollect.data.synthetics.fuzzy_recall import FuzzyRecall, FuzzySlice
from recollect.data.synthetics.in_context_recall import InContextRecall
from recollect.data.synthetics.memorization import Memorization
from recollect.data.synthetics.selective_copying import SelectiveCopying
from recollect.data.synthetics.task import SyntheticTask

EVALUATION_EXAMPLES = 1280
_FEWER_EXAMPLES = [{"train_examples": examples} for examples in (6400, 3200, 1600, 800)]
_LARGER = [{"vocab_size": size} for size in (32, 64, 128)]


def _fuzzy(length: int = 128, **fields: Any) -> FuzzyRecall:
    return FuzzyRecall(length=length, evaluation=(FuzzySlice(length=length, shortest=3),), **fields)


MAD: dict[str, tuple[Callable[..., SyntheticTask], dict[str, Any], list[dict[str, Any]]]] = {
    "in_context_recall": (
        InContextRecall,
        {"train_examples": 12800},
        [*_LARGER, *({"length": length - 1} for length in (256, 512, 1024)), *_FEWER_EXAMPLES],
    ),
    "fuzzy_recall": (
        _fuzzy,
        {"train_examples": 12800},
        [*_LARGER, *({"length": length} for length in (256, 512, 1024)), *_FEWER_EXAMPLES],
    ),
    "noisy_recall": (
        InContextRecall,
        {"vocab_size": 32, "noise_tokens": 16, "noise": 0.2, "train_examples": 12800},
        [
            *({"vocab_size": size} for size in (48, 80, 144)),
            *({"length": length - 1} for length in (256, 512, 1024)),
            *_FEWER_EXAMPLES,
            *({"noise": noise} for noise in (0.4, 0.6, 0.8)),
        ],
    ),
    "selective_copying": (
        SelectiveCopying,
        {"length": 256, "train_examples": 12800},
        [
            *_LARGER,
            *({"length": length} for length in (512, 1024)),
            *_FEWER_EXAMPLES,
            *({"copies": copies} for copies in (32, 64, 96)),
        ],
    ),
    "compression": (
        Compression,
        {"train_examples": 12800},
        [*_LARGER, *({"length": length} for length in (64, 128, 256)), *_FEWER_EXAMPLES],
    ),
    "memorization": (
        Memorization,
        {"train_examples": 256},
        [{"vocab_size": size} for size in (512, 1024, 2048, 4096, 8192)],
    ),
}
"""Class, fields of the baseline, and the published changes of it, by task."""


def mad(name: str, **knobs: Any) -> SyntheticTask:
    """Returns the baseline of a task of MAD by its name; `knobs` replace its fields.

    Raises:
      UserError: there is no task of this name.
    """
    if name not in MAD:
        raise UserError(f"name={name}: MAD has {', '.join(MAD)}")
    cls, fields, _ = MAD[name]
    return cls(**{"evaluation_examples": EVALUATION_EXAMPLES, "extrapolation": (), **fields, **knobs})


def mad_settings(name: str) -> Iterator[tuple[dict[str, Any], SyntheticTask]]:
    """Yields what each setting of a task changes, and the task: the baseline, then one variable changed at a time.

    Raises:
      UserError: there is no task of this name.
    """
    yield {}, mad(name)
    for change in MAD[name][2]:
        yield change, mad(name, **change)


def mad_score(accuracies: Mapping[str, Sequence[float]]) -> float:
    """Returns MAD's score: the mean over the six tasks of the mean over a task's settings of the best run's accuracy.

    Raises:
      UserError: a task or a setting is missing.
    """
    for name, (_, _, changes) in MAD.items():
        if (given := len(accuracies.get(name, ()))) != 1 + len(changes):
            raise UserError(f"{name}: MAD's score needs {1 + len(changes)} accuracies of it, {given} given")
    return sum(sum(accuracies[name]) / len(accuracies[name]) for name in MAD) / len(MAD)
