"""Curves of a run, read from metrics.jsonl: its evaluations, and its training steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recollect.configuration import UserError
from recollect.evaluation.metrics import metric_of


class LearningCurve(NamedTuple):
    """Holds one array entry per evaluation: steps (int), score (in `metric`, a name of METRICS; None where there is
    no score) and loss; NaN where a line has none."""

    steps: np.ndarray
    score: np.ndarray
    loss: np.ndarray
    metric: str | None = None


class TrainingCurve(NamedTuple):
    """Holds one array entry per logged step: steps (int), loss, gradient norm, and tokens per second since the entry
    before; NaN where a line has none."""

    steps: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    tokens_per_second: np.ndarray


def learning_curve(folder: Path | str) -> LearningCurve:
    """Returns the evaluations in a run's metrics.jsonl, of an unfinished run too. A half-written last line is ignored.

    Raises:
      UserError: there is no metrics.jsonl, or a whole line of it is broken (file and line named).
    """

    metric: str | None = None

    def read(record: dict[str, Any]) -> tuple[float, ...] | None:
        nonlocal metric
        if "evaluation" not in record:
            return None
        values = {name: value for name, value in record["evaluation"].items() if value is not None}
        metric = metric_of(values) or metric
        score = math.nan if metric is None else values.get(metric, math.nan)
        return int(record["step"]), float(score), float(values.get("loss", math.nan))

    steps, score, loss = _columns(_rows(folder, read), 3)
    return LearningCurve(steps, score, loss, metric)


def training_curve(folder: Path | str) -> TrainingCurve:
    """Returns the logged steps in a run's metrics.jsonl; raises and ignores as `learning_curve` does."""

    def read(record: dict[str, Any]) -> tuple[float, ...] | None:
        if "loss" not in record:
            return None
        rates = record.get("throughput") or {}
        numbers = (record["loss"], record.get("gradient_norm"), rates.get("tokens_per_second"))
        return int(record["step"]), *(math.nan if number is None else float(number) for number in numbers)

    return TrainingCurve(*_columns(_rows(folder, read), 4))


def _rows(folder: Path | str, read: Callable[[dict[str, Any]], tuple[float, ...] | None]) -> list[tuple[float, ...]]:
    """Returns what `read` makes of each line of metrics.jsonl, without None."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if (row := read(json.loads(line)) if line.strip() else None) is not None:
                rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # What follows the last newline was still being written when the run was cut off.
            if number < len(lines):
                text = line[:60].decode(errors="replace")
                raise UserError(f"{path}, line {number}: not a line of metrics: {text!r}") from None
    return rows


def _columns(rows: list[tuple[float, ...]], count: int) -> list[np.ndarray]:
    """Returns an array for each of `count` columns, the first of integers."""
    columns = zip(*rows, strict=True) if rows else [()] * count
    return [np.array(column, np.float64 if index else np.int64) for index, column in enumerate(columns)]
