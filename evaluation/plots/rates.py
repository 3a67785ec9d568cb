"""Scores against the learning rate: whether the best one lies inside what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recollect.evaluation.plots.style import (
    ERROR_BARS,
    GREY,
    MARKED,
    NothingToPlot,
    error_bars,
    figure,
    score_axis,
    score_label,
    styles,
)
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import by_learning_rate, group_by_label, rate_limits


def score_by_rate(runs: Sequence[RunResult], path: Path | str, title: str | None = None) -> None:
    """Draws the mean over seeds, and their standard deviation, at each learning rate.

    Raises:
      NothingToPlot: nothing to draw, runs of several metrics, or the file cannot be written.
    """
    low, high = rate_limits(runs)
    points = {
        name: near
        for name, rates in by_learning_rate(runs).items()
        if (near := {rate: point for rate, point in rates.items() if low <= rate <= high})
    }
    if not any(len(rates) > 1 for rates in points.values()):
        raise NothingToPlot("there is no architecture with several learning rates to plot")
    label, scale = score_label({run.metric for run in runs})
    mixers = {name: members[0].mixer for name, members in group_by_label(runs).items()}
    looks = styles(list(mixers.items()))
    with figure(path, 2.6, title) as axes:
        axes.set_xscale("log")
        score_axis(axes, label, runs)
        for name, rates in points.items():
            means = scale * np.array([point.mean for point in rates.values()])
            spreads = scale * np.array([point.spread for point in rates.values()])
            errors = error_bars(means, spreads, 100.0 if scale == 100 else float("inf"))
            axes.errorbar(list(rates), means, yerr=errors, fmt="none", ecolor=looks[name]["color"], **ERROR_BARS)
            axes.plot(list(rates), means, ms=4.5, linewidth=0.9, **looks[name], **MARKED)
        if any(point.spread > 0 for rates in points.values() for point in rates.values()):
            axes.errorbar([], [], yerr=[], fmt="none", ecolor=GREY, label="sd over seeds", **ERROR_BARS)
        tried = sorted({rate for rates in points.values() for rate in rates})
        shown = tried if len(tried) <= 6 else tried[:: -(-len(tried) // 6)]
        axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("Learning rate")
