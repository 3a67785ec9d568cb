"""Figures of a study, one column of a paper wide (3.3 inches at 300 dots an inch), drawn from summaries and run folders.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which stay apart for colour-blind readers; every architecture has a
marker too, so that the figures survive a grey print. The same set of labels gets the same colours in every figure.

Easy to get wrong: pyplot keeps global state and a backend, so figures are made without it, under a pinned style that ignores the
user's matplotlibrc; `bbox_inches="tight"` would change the width, so legends are placed by the constrained layout instead.
matplotlib is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configuration import UserError
from evaluation.results import LearningCurve, RunResult, Summary, best_setting, group_by_label, learning_curve, slice_order
from evaluation.table import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3
# Yellow is faint on white, so it comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "*")
GREY = "#777777"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
    "savefig.dpi": 300,
    "figure.dpi": 300,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}


def recall_vs_state(summaries: Sequence[Summary], path: Path | str) -> None:
    """Accuracy against bytes of state at the longest evaluated length, with standard deviation over seeds and the Pareto front.

    Architectures without accuracy or without a state cannot be placed and are left out; a line under the figure names them.

    Raises:
      UserError: nothing to draw, or the file cannot be written.
    """
    shown = [s for s in summaries if s.metric == "accuracy" and s.state_size and not math.isnan(s.best)]
    if not shown:
        raise UserError("there is no architecture with an accuracy and a state size to plot")
    looks, names = _looks(summaries), _short_names(summaries)
    with _figure(path, 2.45) as figure:
        axes = figure.add_subplot()
        sizes = np.array([s.state_size for s in shown], float)
        scores = 100 * np.array([s.best for s in shown])
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes.min() / 1.6, sizes.max() * 1.8)
        axes.set_ylim(-5, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.spines["left"].set_bounds(0, 100)
        _byte_ticks(axes)
        front = _pareto(sizes, scores)
        edge = axes.get_xlim()[1]
        xs, ys = [*sizes[front], edge], [*scores[front], scores[front[-1]]]
        axes.step(xs, ys, where="post", color="#AAAAAA", linewidth=1, zorder=1, label="Pareto front")
        _chance(axes, shown)
        for s, x, y in zip(shown, sizes, scores, strict=True):
            colour, marker = looks[s.label]
            spread = 0 if math.isnan(s.spread) else 100 * s.spread
            # An accuracy is at most 100 %.
            bars = [[min(spread, y)], [min(spread, 100 - y)]]
            axes.errorbar(x, y, yerr=bars, fmt=marker, color=colour, mec="white", mew=0.4, ms=5, elinewidth=0.8, capsize=1.5, capthick=0.8, zorder=3)
        lengths = sorted({s.state_length for s in shown if s.state_length is not None})
        axes.set_xlabel(f"State of one sequence of {lengths[0]:,} tokens" if len(lengths) == 1 else "State at the longest evaluated length")
        axes.set_ylabel("Accuracy (%)")
        missing = [names[s.label] for s in summaries if s not in shown]
        if missing:
            axes.plot([], [], " ", label="not shown: " + ", ".join(missing))
        figure.legend(loc="outside lower center", ncols=1 if missing else 2, handlelength=1.8, borderpad=0.1)
        _place_labels(axes, [names[s.label] for s in shown], sizes, scores, (xs, ys))


def accuracy_by_slice(summaries: Sequence[Summary], path: Path | str) -> None:
    """Accuracy (or bits per byte) by slice at the best learning rate: lines over the slices, or bars where there is one slice.

    Raises:
      UserError: nothing to draw, summaries of both metrics, or the file cannot be written.
    """
    shown = [s for s in summaries if s.by_slice]
    if not shown:
        raise UserError("there is no architecture with results by slice to plot")
    metric, label, scale = _metric({s.metric for s in shown})
    slices = slice_order(name for s in shown for name in s.by_slice)
    looks, names = _looks(summaries), _short_names(summaries)
    with _figure(path, 2.6 if len(slices) > 1 else 0.75 + 0.19 * len(shown)) as figure:
        axes = figure.add_subplot()
        if len(slices) == 1:
            _bars(axes, shown, slices[0], [names[s.label] for s in shown], looks, scale)
            axes.set_xlabel(f"{label}, slice {slices[0].replace('x', '×')}")
            return
        if metric == "accuracy":
            _percent_axis(axes)
            _chance(axes, shown)
        for index, s in enumerate(shown):
            colour, marker = looks[s.label]
            values = scale * np.array([s.by_slice.get(name, math.nan) for name in slices])
            # Moved apart a little: architectures that solve a slice would hide each other.
            x = np.arange(len(slices)) + 0.36 * ((index + 0.5) / len(shown) - 0.5)
            axes.plot(x, values, marker=marker, color=colour, mec="white", mew=0.4, ms=4.5, linewidth=0.9, label=names[s.label], zorder=3)
        sizes = all(name.replace("x", "", 1).isdigit() for name in slices)
        axes.set_xticks(range(len(slices)), [name.replace("x", "\n×") if sizes else name for name in slices])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Sequence length × key–value pairs" if sizes else "Slice")
        axes.set_ylabel(label)
        _legend_below(figure, axes)


def learning_curves(runs: Sequence[RunResult], path: Path | str) -> None:
    """Evaluations over steps: a thin line a run, a bold one for the mean over seeds at each architecture's best learning rate.

    A run that stopped early keeps its last value in the mean.

    Raises:
      UserError: nothing to draw, runs of both metrics, a broken metrics.jsonl, or the file cannot be written.
    """
    curves = {run.folder: learning_curve(run.folder) for run in runs}
    runs = [run for run in runs if len(curves[run.folder].steps)]
    if not runs:
        raise UserError("there is no run with evaluations to plot")
    metric, label, scale = _metric({run.metric for run in runs})
    groups = group_by_label(runs)
    looks, names = _looks_of(list(groups)), _short(list(groups))
    with _figure(path, 2.6) as figure:
        axes = figure.add_subplot()
        if metric == "accuracy":
            _percent_axis(axes)
        for index, (group, members) in enumerate(groups.items()):
            colour, marker = looks[group]
            for run in members:
                axes.plot(curves[run.folder].steps, scale * curves[run.folder].score, color=colour, linewidth=0.5, alpha=0.45, zorder=2)
            steps, score = _mean_curve([curves[run.folder] for run in best_setting(members)])
            spacing = max(1, len(steps) // 6)
            every = (index * spacing // len(groups), spacing)
            marks = {"marker": marker, "markevery": every, "ms": 4, "mec": "white", "mew": 0.4}
            axes.plot(steps, scale * score, color=colour, linewidth=1.5, label=names[group], zorder=3, **marks)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_locators().MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.set_xlabel("Optimizer steps")
        axes.set_ylabel(label)
        _legend_below(figure, axes)


@contextlib.contextmanager
def _figure(path: Path | str, height: float) -> Iterator[Figure]:
    """A figure under the pinned style, saved at the end."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot draw {path}: a figure's name ends in .png, .pdf or .svg")
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _locators() -> Any:
    import matplotlib.ticker

    return matplotlib.ticker


def _metric(metrics: set[str]) -> tuple[str, str, float]:
    """The metric, its axis label, and what values are multiplied by."""
    if len(metrics) > 1:
        raise UserError("recall and text runs cannot share a figure: one has accuracies, the other bits per byte")
    return ("accuracy", "Accuracy (%)", 100.0) if metrics == {"accuracy"} else ("bits_per_byte", "Bits per byte", 1.0)


def _looks(summaries: Sequence[Summary]) -> dict[str, tuple[str, str]]:
    return _looks_of([s.label for s in summaries])


def _looks_of(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by label, from the labels in alphabetical order; 72 architectures look different."""
    return {label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(sorted(set(labels)))}


def _short_names(summaries: Sequence[Summary]) -> dict[str, str]:
    return _short([s.label for s in summaries])


def _short(labels: Sequence[str]) -> dict[str, str]:
    """Labels without the study's name before the dot, where all share it; underscores become spaces."""
    heads = {label.partition(" ")[0].rpartition(".")[0] for label in labels}
    cut = len(heads.pop()) + 1 if len(heads) == 1 and "" not in heads else 0
    return {label: label[cut:].replace("_", " ") for label in labels}


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-3, 104)
    axes.set_yticks(range(0, 101, 20))


def _chance(axes: Axes, summaries: Sequence[Summary], vertical: bool = False) -> None:
    for chance in sorted({s.chance for s in summaries if s.chance is not None}):
        line = axes.axvline if vertical else axes.axhline
        line(100 * chance, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label=f"chance ({100 * chance:.2g} %)")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """As many columns as the figure's width takes."""
    handles, texts = axes.get_legend_handles_labels()
    for columns in (4, 3, 2, 1):
        legend = figure.legend(handles, texts, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.0, borderpad=0.1)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= 0.98 * figure.bbox.width or columns == 1:
            return
        legend.remove()


def _bars(axes: Axes, summaries: Sequence[Summary], name: str, names: list[str], looks: dict[str, tuple[str, str]], scale: float) -> None:
    order = sorted(range(len(summaries)), key=lambda i: summaries[i].by_slice.get(name, math.nan))
    values = [scale * summaries[i].by_slice[name] for i in order]
    spreads = [scale * summaries[i].spread_by_slice.get(name, math.nan) for i in order]
    spreads = [0.0 if math.isnan(spread) else spread for spread in spreads]
    top = 100.0 if scale == 100 else max(values) + max(spreads)
    ends = [min(value + spread, top) for value, spread in zip(values, spreads, strict=True)]
    errors = [np.minimum(spreads, values), np.subtract(ends, values)]
    bars = {"xerr": errors, "error_kw": {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8, "ecolor": "#444444"}}
    axes.barh(range(len(order)), values, height=0.68, color=[looks[summaries[i].label][0] for i in order], **bars)
    for row, (value, end) in enumerate(zip(values, ends, strict=True)):
        axes.annotate(f"{value:.1f}" if scale == 100 else f"{value:.3f}", (end, row), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(order)), [names[i] for i in order])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.14 * top)
    if scale == 100:
        axes.set_xticks(range(0, 101, 20))
        axes.spines["bottom"].set_bounds(0, 100)
        _chance(axes, summaries, vertical=True)
