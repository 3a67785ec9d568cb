"""Scores and losses over the steps of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.evaluation.curves import learning_curve, training_curve
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.plots.style import GREY, MARKED, NothingToPlot, figure, score_axis, score_label, styles
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import best_setting, group_by_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[np.ndarray, np.ndarray]
"""Steps (or tokens), and a value at each."""


def learning_curves(runs: Sequence[RunResult], path: Path | str, title: str | None = None) -> None:
    """Draws evaluations over steps (of text: over tokens): a thin line per run, a bold one for the mean over seeds at
    each architecture's best learning rate.

    A run that stopped early keeps its last value in the mean.

    Raises:
      NothingToPlot: nothing to draw, runs of several metrics, a broken metrics.jsonl, or the file cannot be written.
    """
    evaluations = {run.folder: learning_curve(run.folder) for run in runs}
    runs = [run for run in runs if len(evaluations[run.folder].steps)]
    if not runs:
        raise NothingToPlot("there is no run with evaluations to plot")
    label, scale = score_label({run.metric for run in runs})
    curves = {run.folder: (evaluations[run.folder].steps, scale * evaluations[run.folder].score) for run in runs}
    with figure(path, 2.6, title) as axes:
        score_axis(axes, label, runs)
        _draw(axes, runs, curves, text=scale == 1)


def training_losses(runs: Sequence[RunResult], path: Path | str, title: str | None = None) -> None:
    """Draws the logged loss of training steps in the same way; raises as `learning_curves`."""
    logged = {run.folder: training_curve(run.folder) for run in runs}
    runs = [run for run in runs if len(logged[run.folder].steps)]
    if not runs:
        raise NothingToPlot("there is no run with logged steps to plot")
    curves = {run.folder: (logged[run.folder].steps, logged[run.folder].loss) for run in runs}
    with figure(path, 2.6, title) as axes:
        axes.set_ylabel("Training loss (nats)")
        _draw(axes, runs, curves, text=not METRICS[runs[0].metric].percent)


def _draw(axes: Axes, runs: Sequence[RunResult], curves: dict[Path, Curve], *, text: bool) -> None:
    """Draws the curves by architecture and names the horizontal axis: of `text`, tokens where they are known."""
    from matplotlib.ticker import MaxNLocator

    tokens = text and not any(math.isnan(run.tokens_per_step) for run in runs)
    if tokens:
        per_step = {run.folder: run.tokens_per_step / 1e6 for run in runs}
        curves = {folder: (steps * per_step[folder], values) for folder, (steps, values) in curves.items()}
    groups = group_by_label(runs)
    looks = styles([(label, members[0].mixer) for label, members in groups.items()])
    for index, (group, members) in enumerate(groups.items()):
        thin: dict[str, Any] = {"color": looks[group]["color"], "linewidth": 0.5, "alpha": 0.45, "zorder": 2}
        for run in members:
            axes.plot(*curves[run.folder], **thin)
        steps, values = _mean_curve([curves[run.folder] for run in best_setting(members)])
        spacing = max(1, len(steps) // 6)
        marks = (index * spacing // len(groups), spacing)
        axes.plot(steps, values, linewidth=1.5, markevery=marks, **looks[group], **MARKED)
    if len(runs) > len(groups):
        axes.plot([], [], color=GREY, linewidth=1.5, label="bold: mean at the best rate")
        axes.plot([], [], color=GREY, linewidth=0.5, label="thin: one run")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=not tokens, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.6g}")
    axes.set_xlim(left=0)
    axes.set_xlabel("Millions of tokens" if tokens else "Optimizer steps")


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean over runs at every step at which any has a value; NaN before a run's first one."""
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    return steps, np.mean([np.interp(steps, at, values, left=math.nan) for at, values in curves], axis=0)
