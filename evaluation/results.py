"""Finished run folders as data: one `RunResult` a run, one `Summary` an architecture.

A study is a set of runs that differ in architecture, learning rate and seed. An architecture's score is

    score(architecture) = max over settings of mean over seeds of score(run)

where a setting is the learning rate with everything else that was swept in `optimizer`, `run.steps` and
`run.batch_size`. Papers on recall report the maximum over runs instead (Based, arXiv 2402.18668, figure 2), which grows
with the number of seeds; here seeds are averaged first and their spread is kept. The best is still a choice made on the
evaluation data, so the median over settings stands beside it.

Easy to get wrong: runs of one experiment whose `model` or `data` was overridden are other architectures, not seeds
(they are told apart by config.json, and the label says what differs); a run that diverged counts with the accuracy that
it had; bits per byte are better when lower.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recollect.configuration import UserError

METRICS = {"accuracy": "accuracy_by_slice", "bits_per_byte": "bits_by_slice"}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one finished run left.

    Attributes:
      folder: the run's folder.
      name: the experiment's name.
      status: "finished", "stopped early" or "diverged".
      accuracy: share of right answers, the mean over slices; None for text.
      bits_per_byte: None for recall tasks.
      accuracy_by_slice, loss_by_slice, bits_by_slice: by slice name, for example "64x4"; empty where the run has none.
      loss: of the last evaluation, nats a labelled token; None where the run has none.
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
    state_bytes: dict[int, int]
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
        found = getattr(self, self.metric)
        return math.nan if found is None else found

    @property
    def tokens_per_step(self) -> float:
        """Of text, rows times their length (all ways of making rows keep it constant); NaN where config.json does
        not tell."""
        run, data = self.config.get("run", {}), self.config.get("data", {})
        return float(run.get("batch_size", math.nan)) * float(data.get("length", math.nan))

    @property
    def by_slice(self) -> dict[str, float]:
        """`metric` by slice."""
        return getattr(self, METRICS[self.metric])


class LearningCurve(NamedTuple):
    """One array entry an evaluation: steps (int), score (accuracy, or bits per byte of text) and loss, NaN where a
    line has none."""

    steps: np.ndarray
    score: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Summary:
    """One architecture of a study.

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


def load_run(folder: Path | str) -> RunResult:
    """Reads one finished run.

    Raises:
      UserError: there is no such folder, it is not a run's, the run is not finished, or a file in it is broken (file
        and line named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    path = folder / "result.json"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a run's folder: it holds no config.json")
    if not path.exists():
        raise UserError(
            f"the run in {folder} is not finished: it holds no result.json; the same train command goes on with it"
        )
    config = _object(folder / "config.json")
    result = _object(path)
    if result.get("status") == "preempted":
        raise UserError(
            f"the run in {folder} is not finished: it was preempted; the same train command goes on with it"
        )
    numbers = {
        name: _number(result, name, path) for name in ("steps", "seconds", "parameters", "learning_rate", "seed")
    }
    optional: dict[str, Any] = {
        name: float(_number(result, name, path))
        for name in ("accuracy", "bits_per_byte", "loss", "chance", "examples_per_second", "tokens_per_second")
        if result.get(name) is not None
    }
    if "accuracy" not in optional and "bits_per_byte" not in optional:
        raise UserError(f"{path} has neither 'accuracy' nor 'bits_per_byte'")
    for name in ("name", "status"):
        if not isinstance(result.get(name), str):
            raise UserError(f"{path}: {name!r} must be text, not {result.get(name)!r}")
    state = _numbers(result, "state_bytes", path)
    slices: dict[str, Any] = {
        name: _numbers(result, name, path) for name in ("accuracy_by_slice", "bits_by_slice", "loss_by_slice")
    }
    if not all(length.isdigit() for length in state):
        raise UserError(f"{path}: 'state_bytes' has keys that are not sequence lengths: {', '.join(map(repr, state))}")
    overrides = result.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: 'overrides' must be an object, not {overrides!r}")
    return RunResult(
        folder=folder,
        name=result["name"],
        status=result["status"],
        steps=int(numbers["steps"]),
        seconds=float(numbers["seconds"]),
        parameters=int(numbers["parameters"]),
        learning_rate=float(numbers["learning_rate"]),
        seed=int(numbers["seed"]),
        state_bytes={int(length): int(size) for length, size in state.items()},
        **optional,
        **slices,
        overrides=overrides,
        config=config,
    )


def load_runs(folders: Iterable[Path | str]) -> list[RunResult]:
    """Reads several finished runs; a folder named twice is read once."""
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(Path(folder).resolve(), Path(folder))
    return [load_run(folder) for folder in unique.values()]


def learning_curve(folder: Path | str) -> LearningCurve:
    """The evaluations in a run's metrics.jsonl, of an unfinished run too. A half-written last line is ignored.

    Raises:
      UserError: there is no metrics.jsonl, or a whole line of it is broken (file and line named).
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "evaluation" in record:
                found = record["evaluation"]
                rows.append((int(record["step"]), *(_or_nan(found, *names) for names in (METRICS, ("loss",)))))
        except (ValueError, TypeError, KeyError, RecursionError):
            # What follows the last newline was still being written when the run was cut off.
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a line of metrics: {line[:60].decode(errors='replace')!r}"
            ) from None
    steps, score, loss = zip(*rows, strict=True) if rows else ((), (), ())
    return LearningCurve(np.array(steps, np.int64), np.array(score, np.float64), np.array(loss, np.float64))


def group_by_label(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by architecture, in order of first appearance. Keys are the labels of `Summary`."""
    architectures: dict[tuple[str, frozenset[tuple[str, str]]], list[RunResult]] = {}
    for run in runs:
        fields = {path: value for path, value in _flatten(run.config).items() if path.startswith(("model.", "data."))}
        architectures.setdefault((run.name, frozenset(fields.items())), []).append(run)
    groups = {}
    for (name, own), members in architectures.items():
        others = [other for (other_name, other) in architectures if other_name == name]
        shared = frozenset.intersection(*others)
        differing = {path for other in others for path, _ in other - shared}
        groups[_label(name, differing, dict(own))] = members
    return groups


def best_setting(runs: Sequence[RunResult]) -> list[RunResult]:
    """The seeds of the setting with the best mean, of runs of one architecture; the smallest learning rate wins a
    tie."""
    return max(_settings(runs), key=lambda members: _rank(_mean(members), members[0].metric))


def summarise(runs: Iterable[RunResult]) -> list[Summary]:
    """One `Summary` an architecture, best first within a metric."""
    summaries = [_summary(label, members) for label, members in group_by_label(runs).items()]
    return sorted(summaries, key=lambda s: (s.metric, tuple(-part for part in _rank(s.best, s.metric)), s.label))


def slice_order(names: Iterable[str]) -> list[str]:
    """Slice names in increasing difficulty: "64x8" by length, then pairs; other names in the order given. Repeats
    are dropped."""
    unique = list(dict.fromkeys(names))
    sizes = {name: re.fullmatch(r"(\d+)x(\d+)", name) for name in unique}
    if all(sizes.values()):
        unique.sort(key=lambda name: tuple(int(size) for size in name.split("x")))
    return unique


def _summary(label: str, runs: list[RunResult]) -> Summary:
    settings = _settings(runs)
    best = best_setting(runs)
    means = [_mean(members) for members in settings]
    finite = [mean for mean in means if not math.isnan(mean)]
    slices = slice_order(name for run in best for name in run.by_slice)
    by_slice = {name: [run.by_slice.get(name, math.nan) for run in best] for name in slices}
    evaluated = {int(name.split("x")[0]) for name in slices if re.fullmatch(r"\d+x\d+", name)}
    lengths = [length for length in best[0].state_bytes if length in evaluated] or list(best[0].state_bytes)
    return Summary(
        label=label,
        metric=best[0].metric,
        best=_mean(best),
        median=statistics.median(finite) if finite else math.nan,
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
    """Runs of one architecture by what was swept beside the seed, smallest learning rate first."""
    found: dict[tuple[float, frozenset[tuple[str, str]]], list[RunResult]] = {}
    for run in runs:
        fields = {path: value for path, value in _flatten(run.config).items() if path.startswith("optimizer.")}
        fields |= {
            path: value for path, value in _flatten(run.config).items() if path in ("run.steps", "run.batch_size")
        }
        found.setdefault((run.learning_rate, frozenset(fields.items())), []).append(run)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], sorted(key[1])))]


def _mean(runs: Sequence[RunResult]) -> float:
    return float(np.mean([run.score for run in runs]))


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _rank(score: float, metric: str) -> tuple[bool, float]:
    """Larger is better; NaN is worst."""
    if math.isnan(score):
        return False, 0.0
    return True, score if metric == "accuracy" else -score


def _label(name: str, differing: set[str], fields: dict[str, str]) -> str:
    if not differing:
        return name
    tails = [path.rpartition(".")[2] for path in differing]
    shown = []
    for path in sorted(differing):
        tail = path.rpartition(".")[2]
        shown.append(f"{tail if tails.count(tail) == 1 else path}={fields.get(path, 'none').strip(chr(34))}")
    return f"{name} [{', '.join(shown)}]"


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted path to the value as JSON text."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        flat: dict[str, str] = {}
        for name, item in items:
            flat |= _flatten(item, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: json.dumps(value)}


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({type(error).__name__})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold one JSON object, not {type(data).__name__}")
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(data: dict[str, Any], name: str, path: Path) -> float:
    if not _is_number(data.get(name)):
        raise UserError(f"{path}: {name!r} must be a number, not {data.get(name)!r}")
    return data[name]


def _numbers(data: dict[str, Any], name: str, path: Path) -> dict[str, float]:
    found = data.get(name) or {}
    if not isinstance(found, dict) or not all(value is None or _is_number(value) for value in found.values()):
        raise UserError(f"{path}: {name!r} must be an object of numbers, not {found!r}")
    # A slice of a text that no token fell into has no number.
    return {key: value for key, value in found.items() if value is not None}


def _or_nan(found: dict[str, Any], *names: str) -> float:
    for name in names:
        if found.get(name) is not None:
            return float(found[name])
    return math.nan
