"""What finished runs say about architectures: one `Summary` each, and their scores by learning rate.

A study is a set of runs that differ in architecture, learning rate and seed. An architecture's score is

    score(architecture) = max over settings of mean over seeds of score(run)

where a setting is the learning rate with everything else that was swept in `optimizer`, `run.steps` and
`run.batch_size`. Papers on recall report the maximum over runs instead (Based, arXiv 2402.18668, figure 2), which grows
with the number of seeds; here seeds are averaged first and their spread is kept. The best is still a choice made on the
evaluation data, so the median over settings stands beside it, and `Summary.edges` names where it is at the end of what
was tried.

Scores compare within one metric and one task. A task is what a run is evaluated on: its data without the fields that
change training only, and the slices of its evaluation.

Easy to get wrong: runs of one experiment that differ in `model`, `data`, the optimizer's class, or what they begin with
and train, are other architectures, not seeds (config.json distinguishes them, and the label names what differs); runs
of one seed count once, with their mean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from recollect.evaluation.intervals import mean_interval
from recollect.evaluation.labels import Fields, config_fields, label
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.results import RunResult

TRAINING_ONLY = (
    *("mixture", "train_examples", "sequences", "shuffle", "evaluation_examples", "evaluation", "extrapolation"),
    *("tokenizer", "start_token"),
)
"""Fields of `data` that do not change what is asked (evaluated slices show in their names)."""

ARCHITECTURE = ("model.", "data.", "run.initialize", "optimizer.frozen")
"""How the paths begin in which runs of one name are different architectures; the optimizer's class is one too."""

SETTINGS = ("optimizer.", "run.steps", "run.batch_size")
"""How the paths begin by which the settings of one architecture are distinguished."""


class RatePoint(NamedTuple):
    """Holds the score of one architecture at one learning rate: the mean over seeds, their standard deviation (NaN for
    one), how many there are, the interval of the mean (see `mean_interval`), each seed's score, and the runs."""

    mean: float
    spread: float
    seeds: int
    interval: tuple[float, float] | None
    scores: dict[int, float]
    runs: tuple[RunResult, ...]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Sums up one architecture of a study.

    Attributes:
      label: the experiment's name, with the fields (see ARCHITECTURE) in which runs of that name differ.
      metric: a name of `METRICS`; best, median, spread and by_slice are in its units.
      best: mean over seeds at the best setting.
      median: median over settings of the means over seeds.
      spread: standard deviation over seeds at the best setting (n - 1 in the denominator); NaN for one seed.
      interval: of the mean over seeds at the best setting (see `mean_interval`); None for fewer than three.
      seeds: how many were run at the best setting.
      settings, runs, diverged: learning rates tried, runs in all, and how many of them diverged.
      learning_rate: of the best setting.
      chance: what a guess scores, or None.
      state_bytes: by sequence length; `state_length` is the longest one evaluated, None when no length is known.
      parameters: how many.
      tokens_per_second: median over runs.
      seconds: of all runs together.
      by_slice, spread_by_slice: at the best setting, slices in increasing difficulty.
      slices: sizes by slice name.
      mixer: what mixes tokens: names its colour.
      task: what was asked, in the fields in which the tasks of all runs differ; "" where they have one task.
      by_rate: scores by learning rate, ascending.
      sensitivity: how much worse the score is at the next lower and the next higher learning rate than at the best one,
        in units of the metric, by "lower" and "higher"; without an end beyond which none was tried.
      edges: field -> "lowest" or "highest", where the best setting has the lowest or highest value that was tried, and
        a better one may lie beyond (not at 100 %).
      extended: a run at the best setting went on with another learning-rate schedule than it began with.
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
    slices: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    mixer: str = ""
    task: str = ""
    by_rate: dict[float, RatePoint] = dataclasses.field(default_factory=dict)
    edges: dict[str, str] = dataclasses.field(default_factory=dict)
    extended: bool = False
    interval: tuple[float, float] | None = None

    @property
    def sensitivity(self) -> dict[str, float]:
        rates, sign = list(self.by_rate), 1 if METRICS[self.metric].percent else -1
        place = rates.index(self.learning_rate) if self.learning_rate in rates else 0
        beside = {"lower": rates[:place][-1:], "higher": rates[place + 1 :][:1]}
        return {end: sign * (self.best - self.by_rate[rate].mean) for end, near in beside.items() for rate in near}

    @property
    def state_size(self) -> int | None:
        """Bytes of the state at `state_length`."""
        return None if self.state_length is None else self.state_bytes[self.state_length]


def group_by_label(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Returns the runs by architecture, in order of first appearance; keys are the labels of `Summary`."""
    architectures: dict[tuple[str, Fields], list[RunResult]] = {}
    for run in runs:
        fields = _fields(run, *ARCHITECTURE)
        if kind := run.config.get("optimizer", {}).get("class"):
            fields["optimizer"] = json.dumps(kind)
        architectures.setdefault((run.name, frozenset(fields.items())), []).append(run)
    return _labelled(architectures)


def best_setting(runs: Sequence[RunResult]) -> list[RunResult]:
    """Returns the runs (seeds) of one architecture at its best setting; the smallest learning rate wins a tie."""
    return min(_settings(runs), key=lambda members: METRICS[members[0].metric].rank(_mean(members)))


def summarise(runs: Iterable[RunResult]) -> list[Summary]:
    """Returns one `Summary` per architecture and task, best first within a metric and task."""
    summaries = [
        _summary(label, task, members)
        for task, asked in group_by_task(runs).items()
        for label, members in group_by_label(asked).items()
    ]
    return sorted(summaries, key=lambda s: (s.metric, s.task, METRICS[s.metric].rank(s.best), s.label))


def group_by_task(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Returns the runs by metric and task, in order of first appearance; keys are the tasks of `Summary`."""
    tasks: dict[tuple[str, Fields], list[RunResult]] = {}
    for run in runs:
        fields = _fields(run, "data.")
        asked = {path: value for path, value in fields.items() if f"{path}.".split(".")[1] not in TRAINING_ONLY}
        asked |= {"metric": json.dumps(run.metric), "slices": json.dumps(", ".join(slice_order([run])))}
        name = task_name(run)
        tasks.setdefault((name, frozenset(asked.items())), []).append(run)
    return {"": next(iter(tasks.values()))} if len(tasks) == 1 else _labelled(tasks)


def task_name(run: RunResult) -> str:
    """Returns what a run's config calls its task, else the class of its data."""
    return str(run.config.get("task") or run.config.get("data", {}).get("class", "data"))


def _labelled(groups: dict[tuple[str, Fields], list[RunResult]]) -> dict[str, list[RunResult]]:
    """Returns groups of runs by label; their keys are a name, and the fields that a label may show."""
    return {
        label(name, fields, [other for other_name, other in groups if other_name == name]): members
        for (name, fields), members in groups.items()
    }


def by_learning_rate(runs: Iterable[RunResult]) -> dict[str, dict[float, RatePoint]]:
    """Returns the scores by label and learning rate, ascending. Where other fields of the optimizer were swept too, a
    rate has the score of the best of them."""
    return {label: _by_rate(members) for label, members in group_by_label(runs).items()}


def rate_limits(runs: Sequence[RunResult]) -> tuple[float, float]:
    """Returns between which learning rates figures show scores: a hundredth of the lowest, and a hundred times the
    highest, at which a run did not diverge."""
    rates = [run.learning_rate for run in runs if run.status != "diverged" and run.learning_rate > 0]
    return (min(rates) / 100, max(rates) * 100) if rates else (0.0, math.inf)


def _by_rate(runs: Sequence[RunResult]) -> dict[float, RatePoint]:
    rates: dict[float, list[RunResult]] = {}
    for run in runs:
        rates.setdefault(run.learning_rate, []).append(run)
    return {rate: _rate_point(best_setting(members)) for rate, members in sorted(rates.items())}


def _rate_point(runs: Sequence[RunResult]) -> RatePoint:
    scores = _by_seed(runs)
    values = list(scores.values())
    return RatePoint(_mean(runs), _deviation(values), len(scores), mean_interval(values), scores, tuple(runs))


def _edges(settings: list[list[RunResult]], best: list[RunResult]) -> dict[str, str]:
    """Returns the swept numbers of which the best setting has the lowest or the highest."""
    if METRICS[best[0].metric].percent and _mean(best) >= 1:
        return {}
    tried: dict[str, set[float]] = {}
    for members in settings:
        for path, number in _numbers(members[0]).items():
            tried.setdefault(path, set()).add(number)
    edges = {}
    for path, number in _numbers(best[0]).items():
        if len(tried[path]) > 1 and number in (min(tried[path]), max(tried[path])):
            edges[path] = "lowest" if number == min(tried[path]) else "highest"
    return edges


def _numbers(run: RunResult) -> dict[str, float]:
    """Returns the numbers by which settings are distinguished, by path."""
    values = {path: json.loads(value) for path, value in _fields(run, *SETTINGS).items()}
    numbers = {path: float(value) for path, value in values.items() if type(value) in (int, float)}
    return numbers | {"optimizer.learning_rate": run.learning_rate}


def slice_order(scored: Iterable[RunResult | Summary]) -> list[str]:
    """Returns the names of all slices in increasing difficulty (by length, then what else sizes them), without repeats;
    slices of text, which have no sizes, keep their order."""
    sizes = slice_sizes(scored)
    return sorted(sizes, key=lambda name: tuple(sizes[name].values())) if all(sizes.values()) else list(sizes)


def slice_sizes(scored: Iterable[RunResult | Summary]) -> dict[str, dict[str, float]]:
    """Returns the sizes of all slices by name; {} for those of text."""
    return {name: one.slices.get(name, {}) for one in scored for name in one.by_slice}


def _summary(label: str, task: str, runs: list[RunResult]) -> Summary:
    settings, best = _settings(runs), best_setting(runs)
    means = [mean for mean in map(_mean, settings) if not math.isnan(mean)]
    slices = slice_order(best)
    by_slice = {name: list(_by_seed(best, name).values()) for name in slices}
    scores = list(_by_seed(best).values())
    evaluated = {int(size["length"]) for size in slice_sizes(best).values() if "length" in size}
    lengths = evaluated & best[0].state_bytes.keys() or best[0].state_bytes
    return Summary(
        label=label,
        metric=best[0].metric,
        best=_mean(best),
        median=statistics.median(means) if means else math.nan,
        spread=_deviation(scores),
        interval=mean_interval(scores),
        seeds=len(scores),
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
        slices=slice_sizes(best),
        mixer=best[0].mixer,
        task=task,
        by_rate=_by_rate(runs),
        edges=_edges(settings, best),
        extended=any(run.extended for run in best),
    )


def _settings(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Returns the runs of one architecture by what was swept beside the seed, smallest learning rate first."""
    settings: dict[Any, list[RunResult]] = {}
    for run in runs:
        fields = _fields(run, *SETTINGS)
        settings.setdefault((run.learning_rate, tuple(sorted(fields.items()))), []).append(run)
    return [settings[key] for key in sorted(settings)]


def _fields(run: RunResult, *starts: str) -> dict[str, str]:
    return config_fields(run.config, *starts)


def _mean(runs: Sequence[RunResult]) -> float:
    return float(np.mean(list(_by_seed(runs).values())))


def _by_seed(runs: Sequence[RunResult], name: str | None = None) -> dict[int, float]:
    """Returns a score by seed, of the slice `name` or of all: the mean over its runs."""
    seeds: dict[int, list[float]] = {}
    for run in runs:
        score = run.score if name is None else run.by_slice.get(name, math.nan)
        seeds.setdefault(run.seed, []).append(score)
    return {seed: float(np.mean(values)) for seed, values in seeds.items()}


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
