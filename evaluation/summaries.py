"""What the runs of a study say about architectures: one `Summary` per architecture.

A study is a set of runs that differ in architecture, learning rate and seed. An architecture's score is

    score(architecture) = max over settings of mean over seeds of score(run)

where a setting is the learning rate with everything else that was swept in `optimizer`, `run.steps` and
`run.batch_size`. Papers on recall report the maximum over runs instead (Based, arXiv 2402.18668, figure 2), which grows
with the number of seeds; here seeds are averaged first and their spread is kept. The best is still a choice made on the
evaluation data, so the median over settings stands beside it.

Easy to get wrong: runs of one experiment whose `model` or `data` was overridden are other architectures, not seeds
(config.json distinguishes them, and the label names what differs); a run that diverged counts with the accuracy that it
had; bits per byte are better when lower.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recollect.configuration.io import flatten
from recollect.evaluation.results import RunResult


@dataclasses.dataclass(frozen=True)
class Summary:
    """Sums up one architecture of a study.

    Attributes:
      label: the experiment's name, with the fields of `model` and `data` in which runs of that name differ.
      metric: "accuracy" or "bits_per_byte"; best, median, spread and by_slice are in its units.
      best: mean over seeds at the best setting.
      median: median over settings of the means over seeds.
      spread: standard deviation over seeds at the best setting (n - 1 in the denominator); NaN for one seed.
      seeds: runs at the best setting.
      settings, runs, diverged: learning rates tried, runs in all, and how many of them diverged.
      learning_rate: of the best setting.
      chance: accuracy of a guess, or None.
      state_bytes: by sequence length; `state_length` is the longest one evaluated, None when no length is known.
      parameters: how many.
      tokens_per_second: median over runs.
      seconds: of all runs together.
      by_slice, spread_by_slice: at the best setting, slices in increasing difficulty.
    """

    label: str
    metric: str
    best: float
    median: float
    spread: float
    seeds: int
    settings: int
    runs: int
    diverged: int
    learning_rate: float
    chance: float | None
    state_bytes: dict[int, int]
    state_length: int | None
    parameters: int
    tokens_per_second: float
    seconds: float
    by_slice: dict[str, float]
    spread_by_slice: dict[str, float]

    @property
    def state_size(self) -> int | None:
        """Bytes of the state at `state_length`."""
        return None if self.state_length is None else self.state_bytes[self.state_length]


def group_by_label(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Returns the runs by architecture, in order of first appearance; keys are the labels of `Summary`."""
    architectures: dict[tuple[str, frozenset[tuple[str, str]]], list[RunResult]] = {}
    for run in runs:
        fields = _fields(run, "model.", "data.")
        architectures.setdefault((run.name, frozenset(fields.items())), []).append(run)
    return {
        _label(name, fields, [other for other_name, other in architectures if other_name == name]): members
        for (name, fields), members in architectures.items()
    }


def best_setting(runs: Sequence[RunResult]) -> list[RunResult]:
    """Returns the runs (seeds) of one architecture at its best setting; the smallest learning rate wins a tie."""
    return min(_settings(runs), key=lambda members: rank(_mean(members), members[0].metric))


def summarise(runs: Iterable[RunResult]) -> list[Summary]:
    """Returns one `Summary` per architecture, best first within a metric."""
    summaries = [_summary(label, members) for label, members in group_by_label(runs).items()]
    return sorted(summaries, key=lambda s: (s.metric, rank(s.best, s.metric), s.label))


def rank(score: float, metric: str) -> tuple[bool, float]:
    """Returns a sort key that puts the best score first and NaN last."""
    return (True, 0.0) if math.isnan(score) else (False, -score if metric == "accuracy" else score)


def slice_order(names: Iterable[str]) -> list[str]:
    """Returns slice names in increasing difficulty ("64x8": by length, then pairs), without repeats.

    Names of another kind keep their order.
    """
    unique = list(dict.fromkeys(names))
    return sorted(unique, key=slice_size) if all(map(slice_size, unique)) else unique


def slice_size(name: str) -> tuple[int, ...]:
    """Returns (length, pairs) of a slice named "64x8"; () for a name of another kind."""
    return tuple(map(int, name.split("x"))) if re.fullmatch(r"\d+x\d+", name) else ()


def _summary(label: str, runs: list[RunResult]) -> Summary:
    settings, best = _settings(runs), best_setting(runs)
    means = [mean for mean in map(_mean, settings) if not math.isnan(mean)]
    slices = slice_order(name for run in best for name in run.by_slice)
    by_slice = {name: [run.by_slice.get(name, math.nan) for run in best] for name in slices}
    evaluated = {slice_size(name)[0] for name in slices if slice_size(name)}
    lengths = evaluated & best[0].state_bytes.keys() or best[0].state_bytes
    return Summary(
        label=label,
        metric=best[0].metric,
        best=_mean(best),
        median=statistics.median(means) if means else math.nan,
        spread=_deviation([run.score for run in best]),
        seeds=len(best),
        settings=len(settings),
        runs=len(runs),
        diverged=sum(run.status == "diverged" for run in runs),
        learning_rate=best[0].learning_rate,
        chance=best[0].chance,
        state_bytes=best[0].state_bytes,
        state_length=max(lengths, default=None),
        parameters=best[0].parameters,
        tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        seconds=sum(run.seconds for run in runs),
        by_slice={name: float(np.mean(values)) for name, values in by_slice.items()},
        spread_by_slice={name: _deviation(values) for name, values in by_slice.items()},
    )


def _settings(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Returns the runs of one architecture by what was swept beside the seed, smallest learning rate first."""
    settings: dict[Any, list[RunResult]] = {}
    for run in runs:
        fields = _fields(run, "optimizer.", "run.steps", "run.batch_size")
        settings.setdefault((run.learning_rate, tuple(sorted(fields.items()))), []).append(run)
    return [settings[key] for key in sorted(settings)]


def _fields(run: RunResult, *starts: str) -> dict[str, str]:
    """Returns the fields of a run's config whose paths start so, as JSON text."""
    return {path: value for path, value in flatten(run.config, leaf=json.dumps).items() if path.startswith(starts)}


def _mean(runs: Sequence[RunResult]) -> float:
    return float(np.mean([run.score for run in runs]))


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _label(name: str, fields: frozenset[tuple[str, str]], namesakes: list[frozenset[tuple[str, str]]]) -> str:
    """Returns an experiment's name with the fields in which architectures of that name differ."""
    differing = sorted({path for other in namesakes for path, _ in other - frozenset.intersection(*namesakes)})
    values, tails = dict(fields), [path.rpartition(".")[2] for path in differing]
    names = [tail if tails.count(tail) == 1 else path for path, tail in zip(differing, tails, strict=True)]
    shown = [f"{short}={values.get(path, 'none').strip(chr(34))}" for path, short in zip(differing, names, strict=True)]
    return f"{name} [{', '.join(shown)}]" if shown else name
