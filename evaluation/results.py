"""Finished run folders as data: one `RunResult` per run. What they say about architectures is in summaries.py.

Easy to get wrong: a run that diverged counts with the score that it had.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.machine import expanded
from recollect.configuration.read_json import read_json_object
from recollect.evaluation.appearance import mixer_of
from recollect.evaluation.metrics import METRICS, metric_of

UNFINISHED = ("unfinished", "preempted")

Scores = dict[str, float]
"""Numbers by name: of metrics, slices or sizes."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Holds what one finished run left.

    Attributes:
      folder: the run's folder.
      name: the experiment's name.
      status: "finished", "stopped early" or "diverged".
      metric: what the run is ranked by, a name of `METRICS`.
      scores: means over slices by metric, of those that the run has.
      scores_by_slice: metric -> score by slice name, for example "64x4".
      slices: sizes by slice name, {"64x4": {"length": 64, "pairs": 4}}; {} for slices of text.
      loss, loss_by_slice: of the last evaluation, nats per labelled token; None and {} where the run has none.
      chance, chance_by_slice: what a guess scores in `metric`; None and {} where that is unknown.
      steps, seconds, examples_per_second, tokens_per_second: of training; examples and tokens are NaN in folders
        without them.
      parameters: how many.
      state_bytes: bytes of the decoding state by sequence length.
      learning_rate, seed: of this member.
      overrides: dotted path to value, what the sweep set.
      extended: "step" and "steps_before" of a run that went on with another schedule than it began with; else empty.
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
    metric: str = "bits_per_byte"
    scores: Scores = dataclasses.field(default_factory=dict)
    scores_by_slice: dict[str, Scores] = dataclasses.field(default_factory=dict)
    slices: dict[str, Scores] = dataclasses.field(default_factory=dict)
    loss: float | None = None
    loss_by_slice: dict[str, float] = dataclasses.field(default_factory=dict)
    chance: float | None = None
    chance_by_slice: dict[str, float] = dataclasses.field(default_factory=dict)
    examples_per_second: float = math.nan
    tokens_per_second: float = math.nan
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    extended: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def score(self) -> float:
        """The value of `metric`; NaN where there is none."""
        return self.scores.get(self.metric, math.nan)

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
        return self.scores_by_slice.get(self.metric, {})


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
    if result.get("status") in UNFINISHED:
        reason = "it was preempted" if path.exists() else "it holds no result.json"
        raise UserError(f"the run in {folder} is not finished: {reason}; the same train command goes on with it")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RunResult):
        kind, value = str(field.type).removesuffix(" | None"), result.get(field.name)
        required = field.default is field.default_factory is dataclasses.MISSING
        if kind in _KINDS and (required or value is not None):
            values[field.name] = _read(kind, value, f"{path}: {field.name!r}")
    scores, by_slice = {}, {}
    for name, metric in METRICS.items():
        if result.get(name) is not None:
            scores[name] = _read("float", result[name], f"{path}: {name!r}")
            found = result.get(metric.by_slice) or {}
            by_slice[name] = _read("dict[str, float]", found, f"{path}: {metric.by_slice!r}")
        elif name in result and result["status"] == "diverged":  # may be no number, for which JSON has no word
            scores[name] = math.nan
    if not scores:
        raise UserError(f"{path} has none of {', '.join(map(repr, METRICS))}")
    ranked = metric_of({"metric": result.get("metric"), **scores}) or ""
    sizes = result.get("slices") or {}
    values |= {"metric": ranked, "scores": scores, "scores_by_slice": by_slice}
    values["slices"] = {name: _sizes(name, sizes, f"{path}: 'slices'") for name in by_slice.get(ranked, {})}
    return RunResult(folder=folder, **(values | {"config": read_json_object(folder / "config.json")}))


def _sizes(name: str, slices: Any, what: str) -> Scores:
    """Returns the sizes of a slice; of a result without "slices", those that names of MQAR's slices said."""
    if not isinstance(slices, dict):
        raise UserError(f"{what} must be an object of the sizes of slices, not {slices!r}")
    if not slices and re.fullmatch(r"\d+x\d+", name):
        return dict(zip(("length", "pairs"), map(int, name.split("x")), strict=True))
    return _read("dict[str, float]", slices.get(name, {}), what)


def load_runs(folders: Iterable[Path | str]) -> list[RunResult]:
    """Reads several finished runs; a folder named twice is read once."""
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(Path(folder).resolve(), Path(folder))
    return [load_run(folder) for folder in unique.values()]


def find_runs(patterns: Sequence[str], log: Callable[[str], None] = print, *, unfinished: bool = False) -> list[Path]:
    """Returns the run folders that `patterns` name: run folders, folders with runs somewhere below them, or globs of
    either. Runs that are not finished are left out, and logged, unless they are asked for; so are a file and a folder
    without runs beside others.

    Raises:
      UserError: a pattern names nothing, or none names a run that is finished.
    """
    runs: dict[Path, None] = {}
    left_out: list[str] = []
    stopped: list[Path] = []
    for pattern in patterns:
        path = expanded(pattern, repr(pattern))
        matches = [path] if path.exists() else _glob(pattern)
        below = {folder: _runs_below(folder) for folder in matches}
        if not matches or (not any(below.values()) and len(patterns) == 1):
            what = "holds no run" if matches else "names no folder"
            raise UserError(f"{pattern} {what}: give run folders, folders that hold runs, or globs of them")
        for folder, inside in below.items():
            done = [run for run in inside if unfinished or _is_finished(run)]
            if not inside:
                left_out.append(f"{folder}: holds no run and is left out")
            elif inside == [folder] != done:
                stopped.append(folder)
                left_out.append(f"{folder}: is not finished and is left out")
            elif len(done) < len(inside):
                missing = f"{len(inside) - len(done)} of {len(inside)} runs"
                left_out.append(f"{folder}: {missing} are not finished and are left out")
            runs.update(dict.fromkeys(done))
    if not runs and stopped:
        load_run(stopped[0])  # says what it lacks
    for line in left_out:
        log(line)
    if not runs:
        raise UserError(f"no run in {', '.join(patterns)} is finished")
    return list(runs)


def _glob(pattern: str) -> list[Path]:
    return sorted(Path(match) for match in glob.glob(str(expanded(pattern, pattern)), recursive=True))


def _runs_below(folder: Path) -> list[Path]:
    """Returns the folders with a config.json and a trace of training, `folder` first; checkpoints are not entered."""
    runs = []
    for path, folders, files in os.walk(folder):
        if "config.json" in files and {"result.json", "metrics.jsonl", "environment.json"} & set(files):
            runs.append(Path(path))
            folders.clear()
        folders.sort()
    return runs


def _is_finished(run: Path) -> bool:
    path = run / "result.json"
    return path.exists() and read_json_object(path).get("status") not in UNFINISHED


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
