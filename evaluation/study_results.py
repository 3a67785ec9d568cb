"""results.json of a study: what each mixer scored on each task, so that reports need neither run folders nor a case per
task.

    {
      "tasks": {TASK: {"metric", "title", "unit", "percent", "chance", "slices": {SLICE: sizes}, "data": config}},
      "mixers": {LABEL: {"mixer": class}},
      "cells": [{
        "task", "mixer",                          # keys of the above
        "score", "interval", "learning_rate",     # mean over seeds at the best rate; [low, high], null below 3 seeds
        "sensitivity": {"lower", "higher"},       # how much worse at the next rates; no entry beyond an edge
        "edges": {FIELD: "lowest" | "highest"},   # where the best setting is at the end of what was tried
        "rates": [{"learning_rate", "score", "spread", "interval", "seeds": {SEED: score}, "runs": {SEED: folder}}],
        "by_slice": {SLICE: score}, "metrics": {METRIC: mean over seeds},
        "state_bytes": {LENGTH: bytes}, "state_length", "state_size", "parameters", "tokens_per_second", "seconds",
        "settings", "diverged"
      }]
    }

Scores are in units of the metric (shares of 0 to 1 where "percent"); folders are relative to results.json's; numbers
that are not finite are null.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.configuration.read_json import finite
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import RatePoint, Summary, group_by_label, group_by_task, summarise, task_name


def summarise_study(runs: Sequence[RunResult], folder: Path) -> dict[str, Any]:
    """Returns what results.json in `folder` holds of finished runs, JSON-ready."""
    tasks: dict[str, Any] = {}
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for task, asked in group_by_task(runs).items():
        name, groups = task or task_name(asked[0]), group_by_label(asked)
        summaries = {summary.label: summary for summary in summarise(asked)}
        tasks[name] = _task(asked[0], next(iter(summaries.values())))
        for label in groups:
            cells[name, label] = {"task": name, "mixer": label, **_cell(summaries[label], folder)}
    classes = {mixer: {"mixer": cell.pop("class")} for (_, mixer), cell in cells.items()}
    return finite({"tasks": tasks, "mixers": classes, "cells": list(cells.values())})


def write_study_results(path: Path, runs: Sequence[RunResult]) -> None:
    """Writes `summarise_study` to a file; raises UserError where it cannot be written."""
    try:
        write_json(path, summarise_study(runs, path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _task(run: RunResult, summary: Summary) -> dict[str, Any]:
    metric = METRICS[summary.metric]
    facts = {"title": metric.label, "unit": metric.header, "percent": metric.percent, "chance": summary.chance}
    return {"metric": summary.metric, **facts, "slices": summary.slices, "data": run.config.get("data")}


def _cell(summary: Summary, folder: Path) -> dict[str, Any]:
    runs = summary.by_rate[summary.learning_rate].runs
    metrics = {
        name: float(np.mean([run.scores[name] for run in runs if name in run.scores])) for name in runs[0].scores
    }
    numbers = ("learning_rate", "sensitivity", "edges", "by_slice", "state_bytes", "state_length", "state_size")
    more = ("parameters", "tokens_per_second", "seconds", "settings", "diverged")
    return {
        "class": summary.mixer,
        "score": summary.best,
        "interval": summary.interval,
        "rates": [{"learning_rate": rate, **_rate(point, folder)} for rate, point in summary.by_rate.items()],
        "metrics": metrics,
        **{name: getattr(summary, name) for name in (*numbers, *more)},
    }


def _rate(point: RatePoint, folder: Path) -> dict[str, Any]:
    runs = {run.seed: os.path.relpath(run.folder.resolve(), folder.resolve()) for run in point.runs}
    scores = {"spread": point.spread, "interval": point.interval, "seeds": point.scores}
    return {"score": point.mean, **scores, "runs": runs}
