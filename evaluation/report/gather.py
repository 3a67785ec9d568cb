"""What the page shows, read from run folders: finished runs, runs in training, and runs that failed."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.configuration.read_json import finite, read_json_object
from recollect.evaluation.appearance import mixer_colours
from recollect.evaluation.curves import LearningCurve, TrainingCurve, learning_curve, training_curve
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.results import RunResult, load_run
from recollect.evaluation.summaries import Summary, group_by_label, rate_limits, slice_order, summarise
from recollect.evaluation.table import format_chance

POINTS = 60_000
"""Points of all curves together: about a megabyte of page."""
ENDED = ("finished", "stopped early", "diverged")
NEVER_COMPARED = ("run.directory", "schema_version", "name")


def gather(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns all that the page shows, JSON-ready: "architectures", "runs", "metrics", "slices", "rate_limits",
    "differences" and "environment"."""
    records = [_record(folder) for folder in folders]
    groups = group_by_label(record.result for record in records)
    label_of = {id(run): label for label, members in groups.items() for run in members}
    summaries = {label: _summary(label, members) for label, members in groups.items()}
    order = sorted(groups, key=lambda label: _place(summaries[label]))
    groups = {label: groups[label] for label in order}
    mixers = {label: members[0].mixer or label for label, members in groups.items()}
    colours = mixer_colours(mixers.values())
    points = max(40, POINTS // max(1, 2 * len(records)))
    return finite(
        {
            "architectures": [
                {
                    "label": label,
                    "mixer": mixers[label],
                    "colour": colours[mixers[label]],
                    "runs": len(members),
                    **({} if (summary := summaries[label]) is None else _summary_entries(summary)),
                }
                for label, members in groups.items()
            ],
            "runs": [record.entries(label_of[id(record.result)], points) for record in records],
            "metrics": {
                name: {"percent": one.percent, "title": one.label, "unit": one.header} for name, one in METRICS.items()
            },
            "slices": slice_order(record.result for record in records),
            "rate_limits": rate_limits([record.result for record in records]),
            "differences": _differences(groups),
            "environment": _environment(records),
        }
    )


@dataclasses.dataclass
class Record:
    """One run folder: its result, the files that was read from, and what is wrong with it."""

    result: RunResult
    written: dict[str, Any]
    environment: dict[str, Any]
    evaluations: LearningCurve
    training: TrainingCurve
    message: str

    def entries(self, label: str, points: int) -> dict[str, Any]:
        """Returns the run's entry of the page; curves have at most `points` points."""
        run, folder = self.result, self.result.folder
        settings = run.config.get("run", {})
        return {
            "label": label,
            "name": run.name,
            "folder": str(folder),
            "mixer": run.mixer,
            "status": run.status,
            "message": self.message,
            "metric": run.metric,
            "score": run.score,
            "loss": run.loss,
            "chance": run.chance,
            "chance_text": None if run.chance is None else format_chance(run.chance),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "steps": run.steps,
            "steps_asked": settings.get("steps"),
            "seconds": run.seconds,
            "tokens_per_second": run.tokens_per_second,
            "parameters": run.parameters or None,
            "slices": run.by_slice,
            "evaluations": _thinned(self.evaluations, points, ("steps", "score", "loss")),
            "training": _thinned(self.training, points, ("steps", "loss", "gradient_norm")),
            **_commands(self),
        }


def _record(folder: Path) -> Record:
    """Returns what a folder holds, however far its run is."""
    config = read_json_object(folder / "config.json")
    evaluations, training, broken = _curves(folder)
    written, environment, message, result = {}, {}, broken, None
    try:
        environment = read_json_object(folder / "environment.json") if (folder / "environment.json").exists() else {}
        written = read_json_object(folder / "result.json") if (folder / "result.json").exists() else {}
        if written.get("status") in ENDED:
            result, message = load_run(folder), _failure(written) or broken
    except UserError as error:
        message = str(error)
    result = result or _unfinished(folder, config, evaluations, training, message)
    return Record(result, written, environment, evaluations, training, message)


def _curves(folder: Path) -> tuple[LearningCurve, TrainingCurve, str]:
    """Returns a run's evaluations and logged steps, both empty where there are none or a line of metrics.jsonl is
    broken, and the message about that line."""
    try:
        return learning_curve(folder), training_curve(folder), ""
    except UserError as error:
        none = np.zeros(0)
        broken = str(error) if (folder / "metrics.jsonl").exists() else ""
        return LearningCurve(none, none, none), TrainingCurve(none, none, none, none), broken


def _unfinished(
    folder: Path, config: dict[str, Any], evaluations: LearningCurve, training: TrainingCurve, message: str
) -> RunResult:
    """Returns as much of a result as a run that has not ended (or whose result is damaged) has shown."""
    last = float(evaluations.score[-1]) if len(evaluations.score) else math.nan
    metric = evaluations.metric or ("bits_per_byte" if "tokenizer" in config.get("data", {}) else "accuracy")
    return RunResult(
        folder=folder,
        name=str(config.get("name", folder.name)),
        status="damaged" if message else "not finished",
        steps=int(training.steps[-1]) if len(training.steps) else 0,
        seconds=math.nan,
        parameters=0,
        learning_rate=float(config.get("optimizer", {}).get("learning_rate", math.nan)),
        seed=int(config.get("run", {}).get("seed", 0)),
        metric=metric,
        scores={metric: last},
        config=config,
    )


def _failure(written: dict[str, Any]) -> str:
    """Returns what went wrong in a run that ended, "" where nothing did."""
    failure, skipped = written.get("failure"), written.get("skipped_steps")
    if failure:
        return f"step {failure.get('step')}: {failure.get('found')}"
    return f"{skipped:,} steps were skipped: their loss or gradient was not finite" if skipped else ""


def _summary(label: str, members: list[RunResult]) -> Summary | None:
    """Returns the summary of an architecture's runs that have ended, None where none has."""
    ended = [run for run in members if run.status in ENDED]
    return dataclasses.replace(summarise(ended)[0], label=label) if ended else None


def _place(summary: Summary | None) -> tuple[Any, ...]:
    """Returns a sort key: by metric, best first, architectures without a result last."""
    if summary is None:
        return (True,)
    return False, summary.metric, METRICS[summary.metric].rank(summary.best), summary.label


def _summary_entries(summary: Summary) -> dict[str, Any]:
    names = ("metric", "best", "spread", "median", "learning_rate", "settings", "seeds", "diverged", "chance")
    more = ("state_size", "state_length", "parameters", "tokens_per_second", "seconds", "by_slice")
    return {name: getattr(summary, name) for name in (*names, *more)}


def _thinned(curve: LearningCurve | TrainingCurve, points: int, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Returns columns of a curve, evenly thinned to `points`, with the last one."""
    last = len(curve.steps) - 1
    kept = np.unique(np.linspace(0, last, min(last + 1, points)).round().astype(int))
    steps: list[float] = [int(step) for step in curve.steps[kept]]
    others = {name: [float(f"{value:.5g}") for value in getattr(curve, name)[kept]] for name in names[1:]}
    return {"steps": steps, **others}


def _commands(record: Record) -> dict[str, Any]:
    """Returns "command", the line that started the run ("" where none was kept), and "more": those that look at it."""
    folder = shlex.quote(str(record.result.folder))
    started = record.environment.get("command")
    command = shlex.join(["recollect", *map(str, started[1:])]) if isinstance(started, list) else ""
    lines = []
    if record.written.get("status") in ENDED:
        lines.append(f"recollect evaluate {folder}")
    failure = record.written.get("failure") or {}
    if "folder" in failure:
        lines.append(f"recollect replay {shlex.quote(str(failure['folder']))}")
    return {"command": command, "more": lines}


def _differences(groups: dict[str, list[RunResult]]) -> list[dict[str, Any]]:
    """Returns the config fields in which runs differ, each with its values by architecture."""
    flat = {
        label: [
            flatten(run.config, leaf=lambda value: value if isinstance(value, str) else json.dumps(value))
            for run in members
        ]
        for label, members in groups.items()
    }
    everything = [config for configs in flat.values() for config in configs]
    paths = dict.fromkeys(path for config in everything for path in config)
    rows = []
    for path in paths:
        if path in NEVER_COMPARED or len({config.get(path) for config in everything}) == 1:
            continue
        values = [sorted({config.get(path, "") for config in configs}, key=_by_size) for configs in flat.values()]
        rows.append({"path": path, "values": values})
    return rows


def _by_size(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _environment(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns each entry of environment.json with its values and how many runs have each."""
    flat = [
        flatten({name: value for name, value in record.environment.items() if name != "command"}, leaf=str)
        for record in records
    ]
    rows = []
    for name in dict.fromkeys(name for entries in flat for name in entries):
        values = [entries[name] for entries in flat if name in entries]
        rows.append({"name": name, "values": [[value, values.count(value)] for value in dict.fromkeys(values)]})
    return rows
