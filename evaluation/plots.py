"""Figures of a study, one column of a paper wide (3.3 inches at 300 dpi), drawn from summaries and run folders.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which stay apart for colour-blind readers; every
architecture has a marker too, so that the figures survive a grey print. The same set of labels gets the same colours in
every figure.

Easy to get wrong: pyplot keeps global state and a backend, so figures are made without it, under a pinned style that
ignores the user's matplotlibrc; `bbox_inches="tight"` would change the width, so legends are placed by the constrained
layout instead.
matplotlib is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.configuration import UserError
from recollect.evaluation.curves import LearningCurve, learning_curve
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import Summary, best_setting, group_by_label, slice_order
from recollect.evaluation.table import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3
# Yellow is faint on white, so it comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "*")
GREY = "#777777"
MARKED: dict[str, Any] = {"mec": "white", "mew": 0.4, "zorder": 3}
ERROR_BARS: dict[str, Any] = {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
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
    "text.parse_math": False,  # names may hold a "$"
    "savefig.dpi": 300,
    "figure.dpi": 300,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}


def recall_vs_state(summaries: Sequence[Summary], path: Path | str) -> None:
    """Draws accuracy against bytes of state at the longest evaluated length, with standard deviation over seeds and the
    Pareto front.

    Architectures without accuracy or without a state cannot be placed and are left out; the legend names them.

    Raises:
      UserError: nothing to draw, or the file cannot be written.
    """
    shown = [s for s in summaries if s.metric == "accuracy" and s.state_size and not math.isnan(s.best)]
    if not shown:
        raise UserError("there is no architecture with an accuracy and a state size to plot")
    styles = _styles([s.label for s in summaries])
    with _figure(path, 2.9) as axes:
        sizes, scores = np.array([s.state_size for s in shown], float), 100 * np.array([s.best for s in shown])
        errors = _error_bars(scores, 100 * np.array([s.spread for s in shown]), 100.0)
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes.min() / 1.6, sizes.max() * 1.8)
        _byte_ticks(axes)
        for s, x, y, error in zip(shown, sizes, scores, errors.T, strict=True):
            axes.errorbar(x, y, yerr=error[:, None], fmt="none", ecolor=styles[s.label]["color"], **ERROR_BARS)
            axes.plot(x, y, linestyle="", ms=5, **styles[s.label], **MARKED)
        front = _pareto(sizes, scores)
        xs, ys = [*sizes[front], axes.get_xlim()[1]], [*scores[front], scores[front[-1]]]
        axes.step(xs, ys, where="post", color="#AAAAAA", linewidth=1, zorder=1, label="Pareto front")
        _score_axis(axes, "Accuracy (%)", shown)
        for missing in [s.label for s in summaries if s not in shown]:
            axes.plot([], [], " ", label=f"not shown: {styles[missing]['label']}")
        lengths = {s.state_length for s in shown if s.state_length is not None}
        length = f"{lengths.pop():,} tokens" if len(lengths) == 1 else "the longest evaluated length"
        axes.set_xlabel(f"State size at {length}")


def accuracy_by_slice(summaries: Sequence[Summary], path: Path | str) -> None:
    """Draws accuracy (or bits per byte) by slice at the best learning rate: lines, or bars where there is one slice.

    Raises:
      UserError: nothing to draw, summaries of both metrics, or the file cannot be written.
    """
    shown = [s for s in summaries if s.by_slice]
    if not shown:
        raise UserError("there is no architecture with results by slice to plot")
    label, scale = _axis({s.metric for s in shown})
    slices = slice_order(name for s in shown for name in s.by_slice)
    styles = _styles([s.label for s in summaries])
    with _figure(path, 2.6 if len(slices) > 1 else 0.85 + 0.19 * len(shown)) as axes:
        if len(slices) == 1:
            _bars(axes, sorted(shown, key=lambda s: s.by_slice[slices[0]]), slices[0], styles, scale)
            axes.set_xlabel(f"{label}, slice {_printable(slices[0].replace('x', '×'))}")
            return
        _score_axis(axes, label, shown)
        ranks = sorted(range(len(shown)), key=lambda i: (shown[i].best, i))
        for index, s in enumerate(shown):
            values = scale * np.array([s.by_slice.get(name, math.nan) for name in slices])
            # Moved apart, next in rank not next in place: architectures that solve a slice would hide each other.
            place = ranks.index(index) * _stride(len(shown)) % len(shown)
            x = np.arange(len(slices)) + min(0.6, 0.09 * len(slices)) * ((place + 0.5) / len(shown) - 0.5)
            axes.plot(x, values, ms=4.5, linewidth=0.9, **styles[s.label], **MARKED)
        sizes = all(name.replace("x", "", 1).isdigit() for name in slices)
        axes.set_xticks(
            range(len(slices)), [name.replace("x", "\n×") if sizes else _printable(name) for name in slices]
        )
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Sequence length × key–value pairs" if sizes else "Slice")


def learning_curves(runs: Sequence[RunResult], path: Path | str) -> None:
    """Draws evaluations over steps (of text: over tokens): a thin line per run, a bold one for the mean over seeds at
    each architecture's best learning rate.

    A run that stopped early keeps its last value in the mean.

    Raises:
      UserError: nothing to draw, runs of both metrics, a broken metrics.jsonl, or the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    curves = {run.folder: learning_curve(run.folder) for run in runs}
    runs = [run for run in runs if len(curves[run.folder].steps)]
    if not runs:
        raise UserError("there is no run with evaluations to plot")
    label, scale = _axis({run.metric for run in runs})
    tokens = scale == 1 and not any(math.isnan(run.tokens_per_step) for run in runs)
    if tokens:
        in_millions = {run.folder: curves[run.folder].steps * run.tokens_per_step / 1e6 for run in runs}
        curves = {folder: curves[folder]._replace(steps=steps) for folder, steps in in_millions.items()}
    groups = group_by_label(runs)
    styles = _styles(list(groups))
    with _figure(path, 2.6) as axes:
        _score_axis(axes, label, runs)
        for index, (group, members) in enumerate(groups.items()):
            thin = {"color": styles[group]["color"], "linewidth": 0.5, "alpha": 0.45, "zorder": 2}
            for curve in [curves[run.folder] for run in members]:
                axes.plot(curve.steps, scale * curve.score, **thin)
            steps, score = _mean_curve([curves[run.folder] for run in best_setting(members)])
            spacing = max(1, len(steps) // 6)
            marks = (index * spacing // len(groups), spacing)
            axes.plot(steps, scale * score, linewidth=1.5, markevery=marks, **styles[group], **MARKED)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=not tokens, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.6g}")
        axes.set_xlim(left=0)
        axes.set_xlabel("Millions of tokens" if tokens else "Optimizer steps")


@contextlib.contextmanager
def _figure(path: Path | str, height: float) -> Iterator[Axes]:
    """Yields the axes of a figure under the pinned style; adds the legend and saves the figure at the end."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot draw {path}: a figure's name ends in .png, .pdf or .svg")
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        yield axes
        _legend_below(figure, axes)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _stride(count: int) -> int:
    """Returns the largest step up to a third of `count` that visits every place of a ring of `count`."""
    return next(step for step in range(max(1, count // 3), 0, -1) if math.gcd(step, count) == 1)


def _axis(metrics: set[str]) -> tuple[str, float]:
    """Returns the label of the axis of a metric, and what values are multiplied by."""
    if len(metrics) > 1:
        raise UserError("recall and text runs cannot share a figure: one has accuracies, the other bits per byte")
    if metrics == {"accuracy"}:
        return "Accuracy (%)", 100.0
    return ("Bits per token" if metrics == {"bits_per_token"} else "Bits per byte"), 1.0


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns how the line of each label looks, and its name in the legend: the label without the study's name before
    the dot, where all share it, and with spaces for underscores.

    Colours and markers are given in alphabetical order; 72 architectures look different.
    """
    heads = {label.partition(" ")[0].rpartition(".")[0] for label in labels}
    cut = len(heads.pop()) + 1 if len(heads) == 1 and "" not in heads else 0
    return {
        label: {
            "label": _printable(label[cut:].replace("_", " ")),
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, label in enumerate(sorted(set(labels)))
    }


def _printable(name: str) -> str:
    """Returns a name with a mark for each character that no font draws."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def _score_axis(axes: Axes, label: str, scored: Sequence[Summary | RunResult]) -> None:
    """Names the vertical axis; one of accuracy goes from 0 to 100 % and shows what guessing scores."""
    axes.set_ylabel(label)
    if label == "Accuracy (%)":
        axes.set(ylim=(-3, 104), yticks=range(0, 101, 20))
        _chance(axes.axhline, scored)


def _chance(line: Callable[..., Any], scored: Sequence[Summary | RunResult]) -> None:
    """Draws what guessing scores; `line` is axhline or axvline."""
    for chance in sorted({s.chance for s in scored if s.chance is not None}):
        line(100 * chance, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label=f"chance ({100 * chance:.2g} %)")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Adds a legend, if there is anything to name, of as many columns as the figure's width takes."""
    named = zip(*axes.get_legend_handles_labels(), strict=True)
    entries = [*zip(*sorted(named, key=lambda entry: entry[1].startswith("chance")), strict=True)]
    for columns in (4, 3, 2, 1) if entries else ():
        legend = figure.legend(
            *entries,
            loc="outside lower center",
            ncols=columns,
            handlelength=1.6,
            columnspacing=1.0,
            borderpad=0.1,
        )
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= 0.98 * figure.bbox.width or columns == 1:
            return
        legend.remove()


def _error_bars(values: np.ndarray, spreads: np.ndarray, top: float) -> np.ndarray:
    """Returns how far error bars reach below and above, (2, n): between 0 and `top`; nowhere for one seed."""
    return np.nan_to_num([np.minimum(spreads, values), np.minimum(spreads, top - values)])


def _bars(axes: Axes, summaries: Sequence[Summary], name: str, styles: dict[str, dict[str, Any]], scale: float) -> None:
    """Draws one slice: a bar per architecture, from the bottom up, its value at its end."""
    values = scale * np.array([s.by_slice[name] for s in summaries])
    spreads = scale * np.array([s.spread_by_slice.get(name, math.nan) for s in summaries])
    drawn = np.where(np.isfinite(values), values, 0.0)  # the number beside the bar says that it is infinite
    top = 100.0 if scale == 100 else max(drawn) + max(np.nan_to_num(spreads, posinf=0.0)) or 1.0
    errors = _error_bars(drawn, np.where(np.isfinite(spreads), spreads, math.nan), top)
    names, colours = ([styles[s.label][key] for s in summaries] for key in ("label", "color"))
    bar_errors = {**ERROR_BARS, "ecolor": "#444444"}
    axes.barh(range(len(values)), drawn, xerr=errors, error_kw=bar_errors, color=colours, height=0.68)
    for row, (value, end) in enumerate(zip(values, drawn + errors[1], strict=True)):
        text = f"{value:.1f}" if scale == 100 else f"{value:.3f}"
        axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.14 * top)
    if scale == 100:
        axes.set_xticks(range(0, 101, 20))
        axes.spines["bottom"].set_bounds(0, 100)
        _chance(axes.axvline, summaries)


def _byte_ticks(axes: Axes) -> None:
    """Labels at most six powers of two, on multiples of their spacing."""
    low, high = (math.log2(limit) for limit in axes.get_xlim())
    spacing = max(1, math.ceil((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1)
    labelled = [2.0**power for power in powers if power % spacing == 0]
    axes.set_xticks(labelled, [format_bytes(size).replace(".0 ", " ") for size in labelled])
    axes.set_xticks([2.0**power for power in powers], [""] * len(powers), minor=True)


def _pareto(sizes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Returns the indices of points that no point of the same or a smaller size beats, by size."""
    front: list[int] = []
    for index in np.lexsort((-scores, sizes)):
        if not front or scores[index] > scores[front[-1]]:
            front.append(int(index))
    return front


def _mean_curve(curves: Sequence[LearningCurve]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over runs at every step at which any was evaluated; NaN before a run's first evaluation."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    return steps, np.mean([np.interp(steps, curve.steps, curve.score, left=math.nan) for curve in curves], axis=0)
