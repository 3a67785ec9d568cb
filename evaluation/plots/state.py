"""Recall, and throughput, against the bytes of state: Based's figure 2 (arXiv 2402.18668)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.evaluation.metrics import METRICS
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
from recollect.evaluation.summaries import Summary
from recollect.evaluation.table import format_bytes, format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = dict[str, dict[str, Any]]


def recall_vs_state(summaries: Sequence[Summary], path: Path | str, title: str | None = None) -> None:
    """Draws accuracy (or another share) against bytes of state at the longest evaluated length, with standard
    deviation over seeds and the Pareto front of those better than a guess; sizes of one mixer are joined.

    Architectures without accuracy or without a state cannot be placed and are left out; the legend names them.

    Raises:
      NothingToPlot: nothing to draw, or the file cannot be written.
    """
    shown = [s for s in summaries if METRICS[s.metric].percent and s.state_size and not math.isnan(s.best)]
    if not shown:
        raise NothingToPlot("there is no architecture with an accuracy and a state size to plot")
    looks = styles([(s.label, s.mixer) for s in summaries])
    with figure(path, 2.9, title) as axes:
        sizes, scores = np.array([s.state_size for s in shown], float), 100 * np.array([s.best for s in shown])
        errors = error_bars(scores, 100 * np.array([s.spread for s in shown]), 100.0)
        _state_axis(axes, shown)
        for s, x, y, error in zip(shown, sizes, scores, errors.T, strict=True):
            axes.errorbar(x, y, yerr=error[:, None], fmt="none", ecolor=looks[s.label]["color"], **ERROR_BARS)
        _points(axes, shown, list(scores), looks)
        better = np.array([s.chance is None or s.best > s.chance for s in shown])  # a guess is on no front
        if better.any():
            front = _pareto(sizes[better], scores[better])
            xs, ys = [*sizes[better][front], axes.get_xlim()[1]], [*scores[better][front], max(scores[better])]
            axes.step(xs, ys, where="post", color="#AAAAAA", linewidth=1, zorder=1, label="Pareto front")
        if any(s.spread > 0 for s in shown):
            axes.errorbar([], [], yerr=[], fmt="none", ecolor=GREY, label="sd over seeds", **ERROR_BARS)
        score_axis(axes, score_label({s.metric for s in shown})[0], shown)
        for missing in [s.label for s in summaries if s not in shown]:
            axes.plot([], [], " ", label=f"not shown: {looks[missing]['label']}")


def throughput_vs_state(summaries: Sequence[Summary], path: Path | str, title: str | None = None) -> None:
    """Draws tokens per second in training (the median over runs) against bytes of state at the longest evaluated
    length; raises as `recall_vs_state`."""
    shown = [s for s in summaries if s.state_size and s.tokens_per_second > 0]
    if not shown:
        raise NothingToPlot("there is no architecture with a state size and a rate to plot")
    looks = styles([(s.label, s.mixer) for s in summaries])
    with figure(path, 2.9, title) as axes:
        _state_axis(axes, shown)
        _points(axes, shown, [s.tokens_per_second for s in shown], looks)
        axes.set_ylim(0, 1.08 * max(s.tokens_per_second for s in shown))
        axes.yaxis.set_major_formatter(lambda rate, _: format_count(rate))
        axes.set_ylabel("Tokens per second in training")


def _points(axes: Axes, shown: Sequence[Summary], values: list[float], looks: Looks) -> None:
    """Draws a point for each architecture, and a line through those of one mixer, by size."""
    for mixer in dict.fromkeys(s.mixer for s in shown if s.mixer):
        sizes = sorted((s.state_size or 0, value) for s, value in zip(shown, values, strict=True) if s.mixer == mixer)
        colour = next(looks[s.label]["color"] for s in shown if s.mixer == mixer)
        if len(sizes) > 1:
            axes.plot(*zip(*sizes, strict=True), color=colour, linewidth=0.9, alpha=0.7, zorder=2)
    for s, value in zip(shown, values, strict=True):
        axes.plot(s.state_size or 0, value, ms=5, **{**looks[s.label], "linestyle": ""}, **MARKED)


def _state_axis(axes: Axes, shown: Sequence[Summary]) -> None:
    """Scales and names the horizontal axis: at most six powers of two, on multiples of their spacing."""
    sizes = [float(s.state_size or 0) for s in shown]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.8)
    low, high = (math.log2(limit) for limit in axes.get_xlim())
    spacing = max(1, math.ceil((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1)
    labelled = [2.0**power for power in powers if power % spacing == 0]
    axes.set_xticks(labelled, [format_bytes(size).replace(".0 ", " ") for size in labelled])
    axes.set_xticks([2.0**power for power in powers], [""] * len(powers), minor=True)
    lengths = {s.state_length for s in shown if s.state_length is not None}
    axes.set_xlabel(
        f"State size at {f'{lengths.pop():,} tokens' if len(lengths) == 1 else 'the longest evaluated length'}"
    )


def _pareto(sizes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Returns the indices of points that no point of the same or a smaller size beats, by size."""
    front: list[int] = []
    for index in np.lexsort((-scores, sizes)):
        if not front or scores[index] > scores[front[-1]]:
            front.append(int(index))
    return front
