"""Finished run folders as data, one `RunResult` per run, and what they say about architectures: one `Summary` each.

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.configuration.read_json import read_json_object
from recollect.evaluation.appearance import mixer_of

METRICS = {"accuracy": "accuracy_by_slice", "bits_per_byte": "bits_by_slice"}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Holds what one finished run left.

    Attributes:
      folder: the run's folder.
      name: the experiment's name.
      status: "finished", "stopped early" or "diverged".
      accuracy: share of right answers, the mean over slices; None for text.
      bits_per_byte: None for recall tasks.
      accuracy_by_slice, loss_by_slice, bits_by_slice: by slice name, for example "64x4"; empty where the run has none.
      loss: of the last evaluation, nats per labelled token; None where the run has none.
      chance: accuracy of a guess; None where unknown.
      steps, seconds, examples_per_second, tokens_per_second: of training; examples and tokens are NaN in folders
        without them.
      parameters: how many.
      state_bytes: bytes of the decoding state by sequence length.
      learning_rate, seed: of this member.
      overrides: dotted path to value, what the sweep set.
      config: config.json as it was read.
    """

    folder: Path
    name: str
    status: str
    steps: int
    seconds: float
    parameters: int
    learning_rate: float
    seed: int
    state_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    accuracy: float | None = None
    accuracy_by_slice: dict[str, float] = dataclasses.field(default_factory=dict)
    bits_per_byte: float | None = None
    bits_by_slice: dict[str, float] = dataclasses.field(default_factory=dict)
    loss: float | None = None
    loss_by_slice: dict[str, float] = dataclasses.field(default_factory=dict)
    chance: float | None = None
    examples_per_second: float = math.nan
    tokens_per_second: float = math.nan
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What the run is scored by: "accuracy" or "bits_per_byte"."""
        return "accuracy" if self.accuracy is not None else "bits_per_byte"

    @property
    def score(self) -> float:
        """The value of `metric`."""
        value = getattr(self, self.metric)
        return math.nan if value is None else value

    @property
    def mixer(self) -> str:
        """What mixes tokens, for example "Attention" (see `mixer_of`)."""
        return mixer_of(self.config)

    @property
    def tokens_per_step(self) -> float:
        """Rows times their length, of text (constant however rows are made); NaN where config.json lacks either."""
        run, data = self.config.get("run", {}), self.config.get("data", {})
        return float(run.get("batch_size", math.nan)) * float(data.get("length", math.nan))

    @property
    def by_slice(self) -> dict[str, float]:
        """`metric` by slice."""
        return getattr(self, METRICS[self.metric])


def load_run(folder: Path | str) -> RunResult:
    """Reads one finished run.

    Raises:
      UserError: there is no such folder, it is not a run's, the run is not finished, or a file in it is broken (file
        and line named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a run's folder: it holds no config.json")
    path = folder / "result.json"
    result = read_json_object(path) if path.exists() else {"status": "unfinished"}
    if result.get("status") in ("unfinished", "preempted"):
        reason = "it was preempted" if path.exists() else "it holds no result.json"
        raise UserError(f"the run in {folder} is not finished: {reason}; the same train command goes on with it")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RunResult):
        kind, value = str(field.type).removesuffix(" | None"), result.get(field.name)
        required = field.default is field.default_factory is dataclasses.MISSING
        if kind in _KINDS and (required or value is not None):
            values[field.name] = _read(kind, value, f"{path}: {field.name!r}")
    if "accuracy" not in values and "bits_per_byte" not in values:
        raise UserError(f"{path} has neither 'accuracy' nor 'bits_per_byte'")
    return RunResult(folder=folder, **(values | {"config": read_json_object(folder / "config.json")}))


def load_runs(folders: Iterable[Path | str]) -> list[RunResult]:
    """Reads several finished runs; a folder named twice is read once."""
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(Path(folder).resolve(), Path(folder))
    return [load_run(folder) for folder in unique.values()]


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
      mixer: what mixes tokens: names its colour.
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
    mixer: str = ""

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
        mixer=best[0].mixer,
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


_KINDS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "str": (str, "text", str),
    "int": (int | float, "a number", int),
    "float": (int | float, "a number", float),
    # A slice of a text that no token fell into has no number.
    "dict[str, float]": (
        dict,
        "an object of numbers",
        lambda numbers: {name: float(number) for name, number in numbers.items() if number is not None},
    ),
    "dict[int, int]": (
        dict,
        "an object of numbers",
        lambda sizes: {int(length): int(size) for length, size in sizes.items() if size is not None},
    ),
    "dict[str, Any]": (dict, "an object", dict),
}
"""What an entry of result.json must be, and how it is read, by the annotation of the `RunResult` field of its name."""


def _read(kind: str, value: Any, what: str) -> Any:
    """Returns an entry of result.json as a field with the annotation `kind` holds it."""
    types, expected, convert = _KINDS[kind]
    members = value.values() if isinstance(value, dict) and expected == "an object of numbers" else ()
    numbers = all(member is None or type(member) in (int, float) for member in members)
    if not isinstance(value, types) or isinstance(value, bool) or not numbers:
        raise UserError(f"{what} must be {expected}, not {value!r}")
    if kind == "dict[int, int]" and not all(length.isdigit() for length in value):
        raise UserError(f"{what} has keys that are not sequence lengths: {', '.join(map(repr, value))}")
    return convert(value)
