"""Tokens per second of decoding against the context: `bench generation`'s figure, in which lines cross."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.evaluation.plots.style import MARKED, NothingToPlot, figure, styles
from recollect.evaluation.table import format_count


def decoding_by_context(rows: Sequence[dict[str, Any]], path: Path | str, title: str | None = None) -> None:
    """Draws a line per model and batch.

    Args:
      rows: of the benchmark: name, mixer, length, asked (the batch) and decode_tokens_per_second.

    Raises:
      NothingToPlot: there is no row, or the file cannot be written.
    """
    if not rows:
        raise NothingToPlot("nothing was measured that could be drawn")
    labels = {(row["name"], row["asked"]): f"{row['name']}, batch {row['asked']}" for row in rows}
    looks = styles([(labels[row["name"], row["asked"]], row["mixer"]) for row in rows])
    with figure(path, 2.9, title) as axes:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for line, label in labels.items():
            points = sorted(
                (row["length"], row["decode_tokens_per_second"]) for row in rows if (row["name"], row["asked"]) == line
            )
            axes.plot(*zip(*points, strict=True), ms=4.5, linewidth=0.9, **looks[label], **MARKED)
        lengths = sorted({row["length"] for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.yaxis.set_major_formatter(lambda rate, _: format_count(rate))
        axes.set_xlabel("Context (tokens)")
        axes.set_ylabel("Decoded tokens per second")
