"""What models recall with less than everything: by depth and length of the context, and against what they hold and
read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.evaluation.plots.slices import heat_map
from recollect.evaluation.plots.style import MARKED, NothingToPlot, grid_figure, row_figure, styles
from recollect.evaluation.table import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]


def accuracy_by_depth(rows: Sequence[Row], path: Path | str, title: str | None = None) -> None:
    """Draws accuracy by length of the context (across) and depth of what was asked in it (up), a panel per reader.

    Args:
      rows: of each reader and length: reader, length, accuracy_by_depth (a share by depth).

    Raises:
      NothingToPlot: there is no row, or the file cannot be written.
    """
    if not rows:
        raise NothingToPlot("nothing was measured that could be drawn")
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({depth for row in rows for depth in row["accuracy_by_depth"]}, key=lambda text: int(text[:-1]))
    with grid_figure(path, len(readers), 1.35, title) as panels:
        for reader, axes in zip(readers, panels, strict=True):
            shares = {(row["length"], d): s for row in rows if row["reader"] == reader for d, s in _depths(row)}
            values = [[100 * shares.get((length, depth), math.nan) for length in lengths] for depth in depths]
            heat_map(axes, np.array(values), [_short(length) for length in lengths], depths)
            axes.set_title(reader.replace("_", " "), fontsize=7)
        panels[0].figure.supxlabel("Length of the context (tokens)", fontsize=8)
        panels[0].figure.supylabel("Depth", fontsize=8)


def accuracy_by_cost(rows: Sequence[Row], path: Path | str, title: str | None = None) -> None:
    """Draws accuracy against the bytes that a sequence holds, and against the keys that a token reads: cache policies,
    whose settings are joined, as full markers, mixers that were trained as empty ones.

    Args:
      rows: of each measurement: name, mixer (which has its colour), setting (None for a mixer that was trained),
        accuracy, state_bytes and keys_read.

    Raises:
      NothingToPlot: there is no row, or the file cannot be written.
    """
    if not rows:
        raise NothingToPlot("nothing was measured that could be drawn")
    looks = styles([(row["name"], row["mixer"]) for row in rows])
    with row_figure(path, 2, 2.0 + 0.13 * math.ceil(len(looks) / 2), title) as panels:
        for axes, cost in zip(panels, ("state_bytes", "keys_read"), strict=True):
            for name, look in sorted(looks.items()):
                points = sorted((row[cost], 100 * row["accuracy"]) for row in rows if row["name"] == name)
                trained = all(row["setting"] is None for row in rows if row["name"] == name)
                hollow = {"mfc": "white", "mec": look["color"], "linestyle": ""} if trained else MARKED
                axes.plot(*zip(*points, strict=True), ms=3.5, linewidth=0.8, **{**look, **hollow})
        _powers_of_two(panels[0], [row["state_bytes"] for row in rows])
        panels[0].xaxis.set_major_formatter(lambda size, _: format_bytes(size).replace(".0 ", " "))
        panels[0].set(xlabel="Bytes held", ylabel="Accuracy (%)", ylim=(-3, 104))
        _powers_of_two(panels[1], [row["keys_read"] for row in rows])
        panels[1].xaxis.set_major_formatter(lambda keys, _: f"{keys:g}")
        panels[1].set(xlabel="Keys read per token")


def _powers_of_two(axes: Axes, values: Sequence[float]) -> None:
    """Scales the horizontal axis to show `values`, 0 too, with at most four powers of two on it."""
    above = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log2(min(above))), math.ceil(math.log2(max(above)))
    if min(values) > 0:
        axes.set_xscale("log", base=2)
        start = 2.0 ** (low - 0.5)
    else:
        axes.set_xscale("symlog", base=2, linthresh=1)
        low, start = 0, -0.3
    axes.set_xlim(start, 2.0 ** (high + 0.5))
    powers = range(low, high + 1, max(1, math.ceil((high - low) / 3)))
    axes.set_xticks([0.0] * (min(values) <= 0) + [2.0**power for power in powers])
    axes.set_xticks([], minor=True)


def _depths(row: Row) -> list[tuple[str, float]]:
    return list(row["accuracy_by_depth"].items())


def _short(length: int) -> str:
    """Returns 512 as "512", and 4096 as "4k"."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
