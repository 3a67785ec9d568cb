"""Figures of a study, one column of a paper wide (3.3 inches at 300 dots an inch), drawn from summaries and run
folders.

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
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.configuration import UserError
from recollect.evaluation.results import (
    LearningCurve,
    RunResult,
    Summary,
    best_setting,
    group_by_label,
    learning_curve,
    slice_order,
)
from recollect.evaluation.table import format_bytes

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
    """Accuracy against bytes of state at the longest evaluated length, with standard deviation over seeds and the
    Pareto front.

    Architectures without accuracy or without a state cannot be placed and are left out; a line under the figure names
    them.

    Raises:
      UserError: nothing to draw, or the file cannot be written.
    """
    shown = [s for s in summaries if s.metric == "accuracy" and s.state_size and not math.isnan(s.best)]
    if not shown:
        raise UserError("there is no architecture with an accuracy and a state size to plot")
    looks, names = _looks([s.label for s in summaries]), _short([s.label for s in summaries])
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
            axes.errorbar(
                x,
                y,
                yerr=bars,
                fmt=marker,
                color=colour,
                mec="white",
                mew=0.4,
                ms=5,
                elinewidth=0.8,
                capsize=1.5,
                capthick=0.8,
                zorder=3,
            )
        lengths = sorted({s.state_length for s in shown if s.state_length is not None})
        axes.set_xlabel(
            f"State size at {lengths[0]:,} tokens"
            if len(lengths) == 1
            else "State size at the longest evaluated length"
        )
        axes.set_ylabel("Accuracy (%)")
        missing = [names[s.label] for s in summaries if s not in shown]
        if missing:
            axes.plot([], [], " ", label="not shown: " + ", ".join(missing))
        figure.legend(loc="outside lower center", ncols=1 if missing else 2, handlelength=1.8, borderpad=0.1)
        corners = (np.repeat(xs, 2)[1:], np.repeat(ys, 2)[:-1])
        guesses = [
            (axes.get_xlim(), (100 * chance, 100 * chance))
            for chance in {s.chance for s in shown}
            if chance is not None
        ]
        _place_labels(
            axes,
            [names[s.label] for s in shown],
            [looks[s.label][0] for s in shown],
            sizes,
            scores,
            [corners, *guesses],
        )


def accuracy_by_slice(summaries: Sequence[Summary], path: Path | str) -> None:
    """Accuracy (or bits per byte) by slice at the best learning rate: lines over the slices, or bars where there is one
    slice.

    Raises:
      UserError: nothing to draw, summaries of both metrics, or the file cannot be written.
    """
    shown = [s for s in summaries if s.by_slice]
    if not shown:
        raise UserError("there is no architecture with results by slice to plot")
    metric, label, scale = _metric({s.metric for s in shown})
    slices = slice_order(name for s in shown for name in s.by_slice)
    looks, names = _looks([s.label for s in summaries]), _short([s.label for s in summaries])
    with _figure(path, 2.6 if len(slices) > 1 else 0.85 + 0.19 * len(shown)) as figure:
        axes = figure.add_subplot()
        if len(slices) == 1:
            _bars(axes, shown, slices[0], [names[s.label] for s in shown], looks, scale)
            axes.set_xlabel(f"{label}, slice {slices[0].replace('x', '×')}")
            if axes.get_legend_handles_labels()[0]:
                _legend_below(figure, axes)
            return
        if metric == "accuracy":
            _percent_axis(axes)
            _chance(axes, shown)
        ranks = sorted(range(len(shown)), key=lambda i: (shown[i].best, i))
        for index, s in enumerate(shown):
            colour, marker = looks[s.label]
            values = scale * np.array([s.by_slice.get(name, math.nan) for name in slices])
            # Moved apart, next in rank not next in place: architectures that solve a slice would hide each other.
            place = ranks.index(index) * _stride(len(shown)) % len(shown)
            x = np.arange(len(slices)) + min(0.6, 0.09 * len(slices)) * ((place + 0.5) / len(shown) - 0.5)
            axes.plot(
                x,
                values,
                marker=marker,
                color=colour,
                mec="white",
                mew=0.4,
                ms=4.5,
                linewidth=0.9,
                label=names[s.label],
                zorder=3,
            )
        sizes = all(name.replace("x", "", 1).isdigit() for name in slices)
        axes.set_xticks(range(len(slices)), [name.replace("x", "\n×") if sizes else name for name in slices])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("Sequence length × key–value pairs" if sizes else "Slice")
        axes.set_ylabel(label)
        _legend_below(figure, axes)


def learning_curves(runs: Sequence[RunResult], path: Path | str) -> None:
    """Evaluations over steps, of text over tokens: a thin line a run, a bold one for the mean over seeds at each
    architecture's best learning rate.

    A run that stopped early keeps its last value in the mean.

    Raises:
      UserError: nothing to draw, runs of both metrics, a broken metrics.jsonl, or the file cannot be written.
    """
    curves = {run.folder: learning_curve(run.folder) for run in runs}
    runs = [run for run in runs if len(curves[run.folder].steps)]
    if not runs:
        raise UserError("there is no run with evaluations to plot")
    metric, label, scale = _metric({run.metric for run in runs})
    tokens = metric == "bits_per_byte" and not any(math.isnan(run.tokens_per_step) for run in runs)
    if tokens:
        curves |= {
            run.folder: curves[run.folder]._replace(steps=curves[run.folder].steps * run.tokens_per_step / 1e6)
            for run in runs
        }
    groups = group_by_label(runs)
    looks, names = _looks(list(groups)), _short(list(groups))
    with _figure(path, 2.6) as figure:
        axes = figure.add_subplot()
        if metric == "accuracy":
            _percent_axis(axes)
            _chance(axes, runs)
        for index, (group, members) in enumerate(groups.items()):
            colour, marker = looks[group]
            for run in members:
                axes.plot(
                    curves[run.folder].steps,
                    scale * curves[run.folder].score,
                    color=colour,
                    linewidth=0.5,
                    alpha=0.45,
                    zorder=2,
                )
            steps, score = _mean_curve([curves[run.folder] for run in best_setting(members)])
            spacing = max(1, len(steps) // 6)
            every = (index * spacing // len(groups), spacing)
            marks: dict[str, Any] = {"marker": marker, "markevery": every, "ms": 4, "mec": "white", "mew": 0.4}
            axes.plot(steps, scale * score, color=colour, linewidth=1.5, label=names[group], zorder=3, **marks)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_locators().MaxNLocator(5, integer=not tokens, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.6g}")
        axes.set_xlabel("Millions of tokens" if tokens else "Optimizer steps")
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


def _stride(count: int) -> int:
    """The largest step up to a third of `count` that visits every place of a ring of `count`."""
    return next(step for step in range(max(1, count // 3), 0, -1) if math.gcd(step, count) == 1)


def _metric(metrics: set[str]) -> tuple[str, str, float]:
    """The metric, its axis label, and what values are multiplied by."""
    if len(metrics) > 1:
        raise UserError("recall and text runs cannot share a figure: one has accuracies, the other bits per byte")
    return ("accuracy", "Accuracy (%)", 100.0) if metrics == {"accuracy"} else ("bits_per_byte", "Bits per byte", 1.0)


def _looks(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by label, from the labels in alphabetical order; 72 architectures look different."""
    return {
        label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(sorted(set(labels)))
    }


def _short(labels: Sequence[str]) -> dict[str, str]:
    """Labels without the study's name before the dot, where all share it; underscores become spaces."""
    heads = {label.partition(" ")[0].rpartition(".")[0] for label in labels}
    cut = len(heads.pop()) + 1 if len(heads) == 1 and "" not in heads else 0
    return {label: label[cut:].replace("_", " ") for label in labels}


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-3, 104)
    axes.set_yticks(range(0, 101, 20))


def _chance(axes: Axes, summaries: Sequence[Summary | RunResult], vertical: bool = False) -> None:
    for chance in sorted({s.chance for s in summaries if s.chance is not None}):
        line = axes.axvline if vertical else axes.axhline
        line(100 * chance, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label=f"chance ({100 * chance:.2g} %)")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """As many columns as the figure's width takes."""
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1].startswith("chance")
    )
    handles, texts = zip(*entries, strict=True)
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            handles,
            texts,
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


def _bars(
    axes: Axes,
    summaries: Sequence[Summary],
    name: str,
    names: list[str],
    looks: dict[str, tuple[str, str]],
    scale: float,
) -> None:
    order = sorted(range(len(summaries)), key=lambda i: summaries[i].by_slice.get(name, math.nan))
    values = [scale * summaries[i].by_slice[name] for i in order]
    spreads = [scale * summaries[i].spread_by_slice.get(name, math.nan) for i in order]
    spreads = [0.0 if math.isnan(spread) else spread for spread in spreads]
    top = 100.0 if scale == 100 else max(values) + max(spreads)
    ends = [min(value + spread, top) for value, spread in zip(values, spreads, strict=True)]
    errors = [np.minimum(spreads, values), np.subtract(ends, values)]
    bars: dict[str, Any] = {
        "xerr": errors,
        "error_kw": {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8, "ecolor": "#444444"},
    }
    axes.barh(range(len(order)), values, height=0.68, color=[looks[summaries[i].label][0] for i in order], **bars)
    for row, (value, end) in enumerate(zip(values, ends, strict=True)):
        axes.annotate(
            f"{value:.1f}" if scale == 100 else f"{value:.3f}",
            (end, row),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(order)), [names[i] for i in order])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.14 * top)
    if scale == 100:
        axes.set_xticks(range(0, 101, 20))
        axes.spines["bottom"].set_bounds(0, 100)
        _chance(axes, summaries, vertical=True)


def _byte_ticks(axes: Axes) -> None:
    """At most six labelled powers of two, on a multiple of their spacing."""
    low, high = (math.log2(limit) for limit in axes.get_xlim())
    spacing = max(1, math.ceil((high - low) / 6))
    powers = range(math.ceil(low), math.floor(high) + 1)
    labelled = [2.0**power for power in powers if power % spacing == 0]
    axes.set_xticks(labelled, [format_bytes(size).replace(".0 ", " ") for size in labelled])
    axes.set_xticks([2.0**power for power in powers], [""] * len(powers), minor=True)


def _pareto(sizes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices of points that no point of the same or a smaller size beats, by size."""
    front: list[int] = []
    for index in np.lexsort((-scores, sizes)):
        if not front or scores[index] > scores[front[-1]]:
            front.append(int(index))
    return front


def _mean_curve(curves: Sequence[LearningCurve]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs at every step that any of them was evaluated at; before a run's first evaluation there is no
    mean."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    rows = [np.interp(steps, curve.steps, curve.score, left=math.nan) for curve in curves]
    return steps, np.mean(rows, axis=0)


def _place_labels(
    axes: Axes, names: list[str], colours: list[str], xs: np.ndarray, ys: np.ndarray, lines: list[tuple[Any, Any]]
) -> None:
    """Puts each name at the cheapest free place near its point, the most crowded points first; a thin line joins them
    in a crowd.

    The cost, in points of length: the distance, and fines for covering a marker, a name, a leader or one of `lines`,
    and for leaving the axes.
    """
    from matplotlib.patheffects import withStroke

    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the places are found for this layout
    renderer = figure.canvas.get_renderer()
    unit = figure.dpi / 72
    points = axes.transData.transform(np.column_stack([xs, ys])) / unit
    drawn = [axes.transData.transform(np.column_stack([x, y])) / unit for x, y in lines]
    line = np.concatenate([_along(corners, 3.0) for corners in drawn])
    frame = axes.get_window_extent(renderer)
    bounds = np.array([frame.x0, frame.y0, figure.bbox.x1, min(frame.y1 + 3 * unit, figure.bbox.y1 - unit)]) / unit
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    boxes: list[np.ndarray] = []
    leaders: list[np.ndarray] = []
    for index in np.argsort(np.sort(distances, axis=1)[:, 1:3].sum(axis=1)):
        colour = _darker(colours[index])
        halo = [withStroke(linewidth=1.5, foreground="white")]
        settings: dict[str, Any] = {
            "textcoords": "offset points",
            "va": "center",
            "ha": "center",
            "fontsize": 7,
            "zorder": 5,
        }
        text = axes.annotate(names[index], (xs[index], ys[index]), (0, 0), color=colour, path_effects=halo, **settings)
        extent = text.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / unit / 2
        others = np.delete(points, index, axis=0)
        crowded = np.any(np.delete(distances[index], index) < 14)
        best: tuple[float, Any] = (math.inf, None)
        for gap, angle in itertools.product((3.5, 8, 13, 19, 26, 34, 43, 53), np.arange(0, 2 * math.pi, math.pi / 12)):
            way = np.array([math.cos(angle), math.sin(angle)])
            # A superellipse's radius, so that the name's edge, not its middle, lies `gap` away.
            offset = (half + gap) * np.sign(way) * np.abs(way) ** 0.4
            box = np.concatenate([points[index] + offset - half, points[index] + offset + half])
            near = np.clip(points[index], box[:2], box[2:])
            leader = _along(np.array([points[index], near]), 1.0) if gap > 8 or crowded else points[:0]
            # A leader may leave a marker across others that lie on the same spot.
            apart = leader[np.linalg.norm(leader - points[index], axis=1) > 4]
            cost = gap + 2 * abs(way[0] * way[1]) + 3 * _inside(box, line, 0.5)
            cost += 500 * _inside(box, others, 4) + 1000 * sum(_overlap(box, other) for other in boxes)
            cost += 300 * sum(_inside(box, other, 1) > 0 for other in leaders) + 300 * sum(
                _inside(other, leader, 1) > 0 for other in boxes
            )
            cost += 40 * sum(_inside(np.tile(point, 2), apart, 3) > 0 for point in others) + 100 * sum(
                _cross(leader, other) for other in leaders
            )
            cost += 2000 * (np.any(box[:2] < bounds[:2]) + np.any(box[2:] > bounds[2:]))
            if cost < best[0]:
                best = (cost, (offset, box, leader))
        offset, box, leader = best[1]
        text.set_position(tuple(offset))
        boxes.append(box)
        leaders.append(leader)
        if len(leader):
            ends = axes.transData.inverted().transform(leader[[0, -1]] * unit)
            axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.5, zorder=2, scalex=False, scaley=False)


def _darker(colour: str) -> tuple[float, float, float]:
    """Dark enough for small text on white."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    brightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    scale = min(1.0, 0.35 / max(brightness, 1e-6))
    return red * scale, green * scale, blue * scale


def _along(corners: np.ndarray, spacing: float) -> np.ndarray:
    """Points along a line through `corners`, at most `spacing` apart, both ends among them."""
    parts = [
        np.linspace(a, b, max(2, math.ceil(np.linalg.norm(b - a) / spacing) + 1))
        for a, b in itertools.pairwise(corners)
    ]
    return np.concatenate(parts)


def _inside(box: np.ndarray, points: np.ndarray, margin: float) -> int:
    return int(np.all((points > box[:2] - margin) & (points < box[2:] + margin), axis=1).sum())


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a[:2] < b[2:] + 1) and np.all(b[:2] < a[2:] + 1))


def _cross(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sampled lines come within a point of each other."""
    return bool(len(a) and len(b) and np.linalg.norm(a[:, None] - b[None], axis=-1).min() < 1)
