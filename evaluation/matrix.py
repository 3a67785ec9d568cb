"""The terminal's table of a study of several tasks: a line per mixer, a column per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from recollect.evaluation.metrics import METRICS
from recollect.evaluation.summaries import Summary
from recollect.evaluation.table import ARROWS, GAP, RATE, WIDTH, format_chance, shortened

LONGEST_LABEL, LONGEST_TASK = 30, 20


def format_matrix(summaries: Sequence[Summary], width: int = WIDTH) -> str:
    """Returns the table as text: best scores, mixers with the best mean over tasks first, and what a guess scores.
    Tasks that the width has no room for follow in further blocks.

    A score has an arrow where its learning rate is the highest or lowest tried, and `±` half its interval over seeds
    where there are enough for one; the mean is of mixers that have a score on every task.
    """
    tasks = {summary.task: METRICS[summary.metric] for summary in summaries}
    cells = {(summary.label, summary.task): summary for summary in summaries}
    labels = sorted(dict.fromkeys(summary.label for summary in summaries), key=lambda label: -_mean(label, cells))
    chance = {summary.task: summary.chance for summary in summaries}
    columns = []
    for task, metric in tasks.items():
        header = [shortened(task, LONGEST_TASK), metric.header]
        last = "-" if chance[task] is None else format_chance(chance[task] or 0.0).removesuffix(" %")
        columns.append([*header, *(_text(cells.get((label, task))) for label in labels), last])
    if all(metric.percent for metric in tasks.values()):
        complete = {label: all((label, task) in cells for task in tasks) for label in labels}
        means = [METRICS["accuracy"].text(_mean(label, cells)) if complete[label] else "-" for label in labels]
        columns.append(["mean", "", *means, ""])
    left = _padded(["mixer", "", *(shortened(label, LONGEST_LABEL) for label in labels), "a guess"], str.ljust)
    blocks: list[list[list[str]]] = []
    room = 0
    for column in (_padded(column, str.rjust) for column in columns):
        if room < (needed := len(column[0]) + len(GAP)):
            blocks.append([left])
            room = width - len(left[0])
        blocks[-1].append(column)
        room -= needed
    return "\n\n".join(_ruled(block) for block in blocks) + _notes(summaries)


def _mean(label: str, cells: dict[tuple[str, str], Summary]) -> float:
    """Returns the mean over tasks, NaN counted as nothing, of which more is better."""
    scores = [
        cell.best if METRICS[cell.metric].percent else -cell.best for (of, _), cell in cells.items() if of == label
    ]
    return float(np.mean(np.nan_to_num(scores)))


def _text(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    metric = METRICS[summary.metric]
    arrow = ARROWS.get(summary.edges.get(RATE, ""), "  ")
    half = "" if summary.interval is None else f" ±{metric.text((summary.interval[1] - summary.interval[0]) / 2)}"
    return ("-" if math.isnan(summary.best) else metric.text(summary.best) + half) + arrow


def _padded(column: list[str], pad: Callable[[str, int], str]) -> list[str]:
    size = max(map(len, column))
    return [pad(cell, size) for cell in column]


def _ruled(block: list[list[str]]) -> str:
    rows = [GAP.join(cells).rstrip() for cells in zip(*block, strict=True)]
    rule = GAP.join("-" * len(column[0]) for column in block)
    return "\n".join([*rows[:2], rule, *rows[2:]])


def _notes(summaries: Sequence[Summary]) -> str:
    notes = []
    if any(summary.interval for summary in summaries):
        notes.append("± half the 95 % bootstrap interval of the mean over seeds")
    if any(RATE in summary.edges for summary in summaries):
        notes.append("↑ ↓ the best learning rate is the highest or lowest tried: a better one may lie beyond it")
    return "".join(f"\n{note}" for note in ["", *notes]) if notes else ""
