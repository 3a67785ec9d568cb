"""What all figures share: a column of a paper wide (3.3 inches at 300 dpi), a pinned style, colours, axes, the legend.

A mixer has one colour in every figure (evaluation/appearance.py); every architecture has a marker too, so that the
figures survive a grey print.

Easy to get wrong: pyplot keeps global state and a backend, so figures are made without it, under a pinned style that
ignores the user's matplotlibrc; `bbox_inches="tight"` would change the width, so legends are placed by the constrained
layout instead.
matplotlib is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.configuration import UserError
from recollect.evaluation.appearance import mixer_colours
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import Summary
from recollect.evaluation.table import format_chance, printable, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3
FORMATS = ("png", "pdf", "svg")
DASHES = ("-", (0, (4, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "*")
LONGEST_NAME = 40
"""Characters of a name: with more, no room is left for the axes beside it."""
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


class NothingToPlot(UserError):
    """There is nothing among the runs or summaries that a figure could show."""


@contextlib.contextmanager
def figure(path: Path | str, height: float, title: str | None = None) -> Iterator[Axes]:
    """Yields the axes of a figure under the pinned style; adds the legend and saves the figure at the end."""
    with _saved(path, height, title) as whole:
        axes = whole.add_subplot()
        yield axes
        _legend_below(whole, axes)


@contextlib.contextmanager
def grid_figure(path: Path | str, panels: int, height: float, title: str | None = None) -> Iterator[list[Axes]]:
    """Yields `panels` axes of the same scales, as many beside each other as have room, each `height` inches high; saves
    the figure at the end."""
    columns = min(panels, 3)
    rows = -(-panels // columns)
    with _saved(path, 0.4 + rows * height, title) as whole:
        axes = whole.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for spare in axes[panels:]:
            spare.set_visible(False)
        yield list(axes[:panels])


@contextlib.contextmanager
def row_figure(path: Path | str, panels: int, height: float, title: str | None = None) -> Iterator[list[Axes]]:
    """Yields `panels` axes side by side, of one vertical scale; adds the legend of the first and saves the figure."""
    with _saved(path, height, title) as whole:
        axes = list(whole.subplots(1, panels, sharey=True))
        yield axes
        _legend_below(whole, axes[0])


@contextlib.contextmanager
def _saved(path: Path | str, height: float, title: str | None) -> Iterator[Figure]:
    """Yields an empty figure, and writes it at the end."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"cannot draw {path}: a figure's name ends in .png, .pdf or .svg")
    with matplotlib.style.context(["default", STYLE]):
        whole = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(whole)
        if title:
            whole.suptitle(printable(title), fontsize=8)
        yield whole
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.savefig(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def score_label(metrics: set[str]) -> tuple[str, float]:
    """Returns the label of the axis of a metric, and what values are multiplied by."""
    if len(metrics) > 1:
        raise UserError(f"runs that are ranked by {' and '.join(sorted(metrics))} cannot share a figure")
    (metric,) = metrics
    return METRICS[metric].label, METRICS[metric].scale


def styles(shown: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Returns how the line of each label looks, and its name in the legend: the label without the study's name before
    the dot, where all share it, with spaces for underscores, and without its middle where it is too long.

    Args:
      shown: (label, mixer) of each architecture. The mixer gives the colour; markers go by alphabetical order of
        labels, and a second and third label of one mixer have dashed lines.
    """
    heads = {label.partition(" ")[0].rpartition(".")[0] for label, _ in shown}
    cut = len(heads.pop()) + 1 if len(heads) == 1 and "" not in heads else 0
    shown = [(label, mixer or label) for label, mixer in shown]  # of a config without mixers
    colours = mixer_colours(mixer for _, mixer in sorted(shown))
    seen: dict[str, int] = {}
    looks = {}
    for index, (label, mixer) in enumerate(sorted(set(shown))):
        seen[mixer] = seen.get(mixer, -1) + 1
        looks[label] = {
            "label": shortened(printable(label[cut:].replace("_", " ")), LONGEST_NAME),
            "color": colours[mixer],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[seen[mixer] % len(DASHES)],
        }
    return looks


def score_axis(axes: Axes, label: str, scored: Sequence[Summary | RunResult]) -> None:
    """Names the vertical axis; one in percent goes from 0 to 100 and shows what guessing scores."""
    axes.set_ylabel(label)
    if METRICS[scored[0].metric].percent:
        axes.set(ylim=(-3, 104), yticks=range(0, 101, 20))
        chance(axes.axhline, scored)


def chance(line: Callable[..., Any], scored: Sequence[Summary | RunResult]) -> None:
    """Draws what guessing scores; `line` is axhline or axvline."""
    for level in sorted({s.chance for s in scored if s.chance is not None}):
        line(100 * level, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label=f"chance ({format_chance(level)})")


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


def error_bars(values: np.ndarray, spreads: np.ndarray, top: float) -> np.ndarray:
    """Returns how far error bars reach below and above, (2, n): between 0 and `top`; nowhere for one seed."""
    return np.nan_to_num([np.minimum(spreads, values), np.minimum(spreads, top - values)])
