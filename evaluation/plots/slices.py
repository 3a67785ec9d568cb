"""Scores by slice: lines over sizes, points over other slices, bars of one, and a map of two sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.evaluation.metrics import METRICS
from recollect.evaluation.plots.style import (
    ERROR_BARS,
    MARKED,
    NothingToPlot,
    chance,
    error_bars,
    figure,
    grid_figure,
    score_axis,
    score_label,
    styles,
)
from recollect.evaluation.summaries import Summary, slice_order, slice_sizes
from recollect.evaluation.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_by_slice(summaries: Sequence[Summary], path: Path | str, title: str | None = None) -> None:
    """Draws the score by slice at the best learning rate: lines over sizes, points over slices of another
    kind, which have no order, and bars where there is one slice.

    Raises:
      NothingToPlot: nothing to draw, summaries of several metrics, or the file cannot be written.
    """
    shown = [s for s in summaries if s.by_slice]
    if not shown:
        raise NothingToPlot("there is no architecture with results by slice to plot")
    label, scale = score_label({s.metric for s in shown})
    slices, axis = slice_order(shown), _axes(shown)
    looks = styles([(s.label, s.mixer) for s in summaries])
    with figure(path, 2.6 if len(slices) > 1 else 0.85 + 0.19 * len(shown), title) as axes:
        if len(slices) == 1:
            _bars(axes, sorted(shown, key=lambda s: s.by_slice[slices[0]]), slices[0], looks, scale)
            axes.set_xlabel(f"{label}, slice {printable(slices[0].replace('x', '×'))}")
            return
        score_axis(axes, label, shown)
        ranks = sorted(range(len(shown)), key=lambda i: (shown[i].best, i))
        for index, s in enumerate(shown):
            values = scale * np.array([s.by_slice.get(name, math.nan) for name in slices])
            # Moved apart, next in rank not next in place: architectures that solve a slice would hide each other.
            place = ranks.index(index) * _stride(len(shown)) % len(shown)
            x = np.arange(len(slices)) + min(0.6, 0.09 * len(slices)) * ((place + 0.5) / len(shown) - 0.5)
            look = looks[s.label] if axis else {**looks[s.label], "linestyle": ""}
            axes.plot(x, values, ms=4.5, linewidth=0.9, **look, **MARKED)
        axes.set_xticks(range(len(slices)), [name.replace("x", "\n×") if axis else printable(name) for name in slices])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(" × ".join(axis) or "Slice")


def accuracy_map(summaries: Sequence[Summary], path: Path | str, title: str | None = None) -> None:
    """Draws accuracy (or another share) over sequence length and the other size of slices, such as pairs, a panel for
    each architecture; sizes that were not evaluated stay white.

    Raises:
      NothingToPlot: no architecture was evaluated at several values of both of two sizes.
      UserError: the file cannot be written.
    """
    shown = [s for s in summaries if METRICS[s.metric].percent and _is_grid(s)]
    if not shown:
        raise NothingToPlot("there is no architecture evaluated over two sizes of slices to plot")
    label, (across, up) = score_label({s.metric for s in shown})[0], _axes(shown)
    sizes = {name: tuple(size.values()) for name, size in slice_sizes(shown).items()}
    lengths, pairs = (sorted({size[axis] for size in sizes.values()}) for axis in (0, 1))
    looks = styles([(s.label, s.mixer) for s in shown])
    with grid_figure(path, len(shown), 0.45 + 0.17 * len(pairs), title) as panels:
        for s, axes in zip(shown, panels, strict=True):
            values = np.full((len(pairs), len(lengths)), math.nan)
            for name, accuracy in s.by_slice.items():
                length, count = sizes[name]
                values[pairs.index(count), lengths.index(length)] = 100 * accuracy
            heat_map(axes, values, [f"{length:,g}" for length in lengths], [f"{count:,g}" for count in pairs])
            axes.set_title(looks[s.label]["label"], fontsize=7, color=looks[s.label]["color"])
        panels[0].figure.supxlabel(f"{across}; {label[0].lower()}{label[1:]}", fontsize=8)
        panels[0].figure.supylabel(f"{up[0].upper()}{up[1:]}", fontsize=8)


def heat_map(axes: Axes, values: np.ndarray, across: Sequence[str], up: Sequence[str]) -> None:
    """Draws percentages (up, across) as colours, with their numbers and the names of columns and rows; NaN is white."""
    axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(up)), up)
    axes.grid(visible=False)


def _is_grid(summary: Summary) -> bool:
    sizes = [tuple(size.values()) for size in slice_sizes([summary]).values()]
    return len(_axes([summary])) == 2 and all(len({size[axis] for size in sizes}) > 1 for axis in (0, 1))


def _axes(summaries: Sequence[Summary]) -> list[str]:
    """Returns the names of the sizes that all slices have; none for slices of text."""
    names = {tuple(size) for size in slice_sizes(summaries).values()}
    return [{"length": "Sequence length"}.get(n, n.replace("_", " ")) for n in names.pop()] if len(names) == 1 else []


def _stride(count: int) -> int:
    """Returns the largest step up to a third of `count` that visits every place of a ring of `count`."""
    return next(step for step in range(max(1, count // 3), 0, -1) if math.gcd(step, count) == 1)


def _bars(axes: Axes, summaries: Sequence[Summary], name: str, looks: dict[str, dict[str, Any]], scale: float) -> None:
    """Draws one slice: a bar per architecture, from the bottom up, its value at its end."""
    values = scale * np.array([s.by_slice[name] for s in summaries])
    spreads = scale * np.array([s.spread_by_slice.get(name, math.nan) for s in summaries])
    drawn = np.where(np.isfinite(values), values, 0.0)  # the number beside the bar says that it is infinite
    top = 100.0 if scale == 100 else max(drawn) + max(np.nan_to_num(spreads, posinf=0.0)) or 1.0
    errors = error_bars(drawn, np.where(np.isfinite(spreads), spreads, math.nan), top)
    names, colours = ([looks[s.label][key] for s in summaries] for key in ("label", "color"))
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
        chance(axes.axvline, summaries)
