"""All figures that a set of runs has something for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.evaluation.plots.curves import learning_curves, training_losses
from recollect.evaluation.plots.rates import score_by_rate
from recollect.evaluation.plots.slices import accuracy_by_slice, accuracy_map
from recollect.evaluation.plots.state import recall_vs_state, throughput_vs_state
from recollect.evaluation.plots.style import FORMATS, NothingToPlot
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import summarise


def draw_all(
    runs: Sequence[RunResult], folder: Path, formats: Sequence[str] = ("png",), title: str | None = None
) -> list[Path]:
    """Draws into `folder` what there is to draw of runs of one task, and returns the files.

    Args:
      formats: of "png", "pdf" and "svg"; each figure is written in all of them.
      title: beginning of the figures' titles; None: they have none.

    Raises:
      UserError: a file cannot be written, or a metrics.jsonl is broken.
    """
    summaries = summarise(runs)
    metric = summaries[0].metric
    figures: dict[str, tuple[str, Callable[..., None], Any]] = {
        f"{metric}_by_slice": (f"{metric} by slice", accuracy_by_slice, summaries),
        "accuracy_map": ("scores by two sizes", accuracy_map, summaries),
        "learning_curves": ("learning curves", learning_curves, runs),
        "training_loss": ("training loss", training_losses, runs),
        f"{metric}_by_learning_rate": (f"{metric} by learning rate", score_by_rate, runs),
        "recall_vs_state": ("recall against state", recall_vs_state, summaries),
        "throughput_vs_state": ("throughput against state", throughput_vs_state, summaries),
    }
    drawn = []
    for name, (what, draw, data) in figures.items():
        for suffix in formats:
            path = folder / f"{name}.{suffix}"
            try:
                draw(data, path, f"{title}: {what.replace('_', ' ')}" if title else None)
                drawn.append(path)
            except NothingToPlot:
                break
    return drawn


def delete_figures(out: Path) -> None:
    """Deletes the figures that `draw_all` drew into a folder, and into those of tasks right below it; the latter
    go too where nothing else is in them."""
    endings = ("_by_slice", "_by_learning_rate", "_vs_state")
    folders = set()
    for path in [*out.glob("*.*"), *out.glob("*/*.*")]:
        known = path.stem in ("accuracy_map", "learning_curves", "training_loss") or path.stem.endswith(endings)
        if known and path.suffix.removeprefix(".") in FORMATS:
            path.unlink()
            folders.add(path.parent)
    for folder in folders - {out}:
        if not any(folder.iterdir()):
            folder.rmdir()


def formats_of(text: str) -> tuple[str, ...]:
    """Returns the formats that "png,svg" names; raises UserError for one that there is not."""
    formats = tuple(part.strip().lower().removeprefix(".") for part in text.split(","))
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {text}: {name!r} is none; there are {', '.join(FORMATS)}, for example png,svg")
    return formats
