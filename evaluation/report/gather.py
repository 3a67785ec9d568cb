"""What the page shows, read from run folders: finished runs, runs in training, and runs that failed.

An architecture is a mixer on a task. The page's rows are mixers, by the label that `group_by_label` gives them within a
task: one that runs on several tasks has one row, one colour and one mark.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.configuration.io import flatten
from recollect.configuration.read_json import finite
from recollect.evaluation.appearance import mixer_colours
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.report.configs import differences, pooled
from recollect.evaluation.report.records import ENDED, Record, read_record
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import (
    Summary,
    group_by_label,
    group_by_task,
    rate_limits,
    slice_order,
    summarise,
)
from recollect.evaluation.table import format_chance

POINTS = 60_000
"""Points of all curves together: about a megabyte of page."""


@dataclasses.dataclass
class Architecture:
    """The runs of one mixer on one task, and their summary; None where none has ended."""

    task: str
    label: str
    runs: list[RunResult]
    summary: Summary | None

    @property
    def mixer(self) -> str:
        return self.runs[0].mixer or self.label


def gather(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns all that the page shows, JSON-ready: "tasks", "rows", "architectures", "runs", "configs", "metrics",
    "rate_limits", "differences" and "environment". Tasks, rows and runs are named by their places in these."""
    records = [read_record(folder) for folder in folders]
    runs = [record.result for record in records]
    tasks = _tasks(runs)
    architectures = [
        Architecture(task, label, members, _summary(members))
        for task, asked in tasks.items()
        for label, members in group_by_label(asked).items()
    ]
    architectures.sort(key=lambda one: (list(tasks).index(one.task), _rank(one.summary)))
    rows: dict[str, list[Architecture]] = {}
    for one in architectures:
        rows.setdefault(one.label, []).append(one)
    places = {id(run): place for place, run in enumerate(runs)}
    belongs = {places[id(run)]: place for place, one in enumerate(architectures) for run in one.runs}
    configs, own = pooled([run.config for run in runs])
    points = max(8, POINTS // max(1, 2 * len(records)))
    return finite(
        {
            "tasks": [_task(task, asked) for task, asked in tasks.items()],
            "rows": _rows({label: members[0].mixer for label, members in rows.items()}),
            "architectures": [
                {
                    "row": list(rows).index(one.label),
                    "task": list(tasks).index(one.task),
                    "runs": len(one.runs),
                    **({} if one.summary is None else _entries(one.summary, places)),
                }
                for one in architectures
            ],
            "runs": [
                {**record.entries(points), "architecture": belongs[place], "config": own[place]}
                for place, record in enumerate(records)
            ],
            "configs": configs,
            "metrics": {
                name: {"percent": one.percent, "title": one.label, "unit": one.header} for name, one in METRICS.items()
            },
            "rate_limits": rate_limits(runs),
            "differences": differences(
                {label: [run.config for one in members for run in one.runs] for label, members in rows.items()}
            ),
            "environment": _environment(records),
        }
    )


def _tasks(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Returns the runs by task. One that has not ended, whose slices are not known yet, is of the task of a run that
    has ended on the same data."""
    ended = {_data(run): run for run in reversed(runs) if run.status in ENDED}
    waiting = [(run, ended.get(_data(run))) for run in runs if run.status not in ENDED]
    alone = [run for run, other in waiting if other is None]
    tasks = group_by_task([run for run in runs if run.status in ENDED] + alone)
    task_of = {id(run): task for task, members in tasks.items() for run in members}
    for run, other in waiting:
        if other is not None:
            tasks[task_of[id(other)]].append(run)
    return tasks


def _data(run: RunResult) -> str:
    return json.dumps([run.config.get("task"), run.config.get("data")])


def _task(name: str, runs: Sequence[RunResult]) -> dict[str, Any]:
    chance = next((run.chance for run in runs if run.chance is not None), None)
    shown = {"chance": chance, "chance_text": None if chance is None else format_chance(chance)}
    return {"name": name, "metric": runs[0].metric, "slices": slice_order(runs), **shown}


def _rows(mixers: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the entry of each label: its mixer, and how it looks: the mixer's colour, a dash of its own among those
    of this mixer, and a mark of its own."""
    colours, marks = mixer_colours(mixers.values()), sorted(mixers)
    rows: list[dict[str, Any]] = []
    for label, mixer in mixers.items():
        dash = sum(row["mixer"] == mixer for row in rows)
        look = {"colour": colours[mixer], "dash": dash, "shape": marks.index(label)}
        rows.append({"label": label, "mixer": mixer, "look": look})
    return rows


def _summary(members: list[RunResult]) -> Summary | None:
    """Returns the summary of an architecture's runs that have ended, None where none has."""
    ended = [run for run in members if run.status in ENDED]
    return summarise(ended)[0] if ended else None


def _rank(summary: Summary | None) -> tuple[Any, ...]:
    """Returns a sort key: best first, architectures without a result last."""
    return (True,) if summary is None else (False, METRICS[summary.metric].rank(summary.best), summary.label)


def _entries(summary: Summary, places: dict[int, int]) -> dict[str, Any]:
    """Returns what the page shows of a summary; "rates" holds [learning rate, score, runs] of each that was tried."""
    names = ("metric", "best", "spread", "interval", "median", "learning_rate", "settings", "seeds", "diverged")
    more = ("chance", "state_size", "state_length", "parameters", "tokens_per_second", "seconds", "by_slice")
    rates = [(rate, point.mean, [places[id(run)] for run in point.runs]) for rate, point in summary.by_rate.items()]
    best = summary.by_rate[summary.learning_rate]
    return {
        **{name: getattr(summary, name) for name in (*names, *more)},
        "scores": list(best.scores.values()),
        "sensitivity": summary.sensitivity,
        "rates": rates,
    }


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
