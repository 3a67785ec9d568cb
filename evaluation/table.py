"""The terminal's table of a study, and results.csv.

The table has one line per architecture, best first: mean over seeds at the best learning rate, its standard deviation,
and the median over learning rates (see evaluation/summaries.py). The csv has one line per run with every number as
Python's shortest text that reads back as the same float.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import replacing
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import Summary, group_by_label, rank, slice_order

WIDTH = 120
GAP = "  "
LEAST_LABEL = 18
CSV_COLUMNS = (
    *("folder", "name", "label", "status", "learning_rate", "seed", "accuracy", "bits_per_byte", "loss", "chance"),
    *("steps", "seconds", "examples_per_second", "tokens_per_second", "parameters"),
)
CSV_FAMILIES = {
    "state_bytes": "state_bytes",
    "accuracy": "accuracy_by_slice",
    "bits": "bits_by_slice",
    "loss": "loss_by_slice",
    "override": "overrides",
}
"""Columns of the csv that have a key, `family[key]`, and the field of a run that holds their values by key."""

Columns = dict[str, Callable[[Summary], str]]


def format_table(summaries: Sequence[Summary], width: int = WIDTH) -> str:
    """Returns the table as text, no line longer than `width` (at least 110; long labels lose their middle).

    Slices follow in blocks of their own, where there are several. Recall and text architectures get a table each,
    because their scores cannot be compared.

    Raises:
      UserError: there are no summaries.
    """
    if not summaries:
        raise UserError("there are no finished runs to tabulate")
    blocks = []
    for metric in dict.fromkeys(summary.metric for summary in summaries):
        rows = sorted((s for s in summaries if s.metric == metric), key=lambda s: rank(s.best, s.metric))
        blocks += [_aligned(rows, columns, width) for columns in [_columns(rows), *_slice_columns(rows, width)]]
    return "\n\n".join(blocks)


def write_csv(path: Path | str, runs: Sequence[RunResult]) -> None:
    """Writes one row per run, in the order given; replaces the file as a whole.

    Columns: CSV_COLUMNS first, then those of CSV_FAMILIES, each for all keys that any run has; an empty cell where a
    run has none.

    Raises:
      UserError: there are no runs, or the file cannot be written.
    """
    if not runs:
        raise UserError("there are no finished runs to write")
    rows = {id(run): {name: getattr(run, name, None) for name in CSV_COLUMNS} for run in runs}
    for label, members in group_by_label(runs).items():
        for run in members:
            rows[id(run)]["label"] = label
    columns = list(CSV_COLUMNS)
    for family, field in CSV_FAMILIES.items():
        keys = [key for run in runs for key in getattr(run, field)]
        ordered = sorted(set(keys)) if family in ("state_bytes", "override") else slice_order(keys)
        columns += [f"{family}[{key}]" for key in ordered]
        for run in runs:
            rows[id(run)] |= {f"{family}[{key}]": value for key, value in getattr(run, field).items()}
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[id(run)] for run in runs)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def format_bytes(size: float | None) -> str:
    """Formats bytes: 1,023 B, 12.3 KiB, 4.5 MiB; '-' for None."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        # 1,023.97 KiB would be shown as 1,024.0 KiB.
        if round(size, 1) < 1024 or unit == "GiB":
            break
    return f"{size:,.1f} {unit}"


def format_count(number: float) -> str:
    """Formats a count: 1,234,567, then 12.3M, 4.5G; '-' for NaN."""
    if math.isnan(number):
        return "-"
    if number < 1e7:
        return f"{number:,.0f}"
    return f"{number / 1e6:,.1f}M" if number < 999.95e6 else f"{number / 1e9:,.1f}G"


def format_seconds(seconds: float) -> str:
    """Formats seconds: 12.3s, 4m 05s, 3h 20m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}h {minutes:02d}m"


def format_score(value: float, metric: str) -> str:
    """Formats accuracy as a percentage, bits per byte with three decimals; '-' for NaN."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.3f}"


def _columns(summaries: Sequence[Summary]) -> Columns:
    """Returns header and text of the columns of the main block."""
    metric = summaries[0].metric
    lengths = {summary.state_length for summary in summaries}
    same = len(lengths) == 1 and None not in lengths
    columns: Columns = {
        "accuracy %" if metric == "accuracy" else "bits/byte": lambda s: format_score(s.best, metric),
        "± sd": lambda s: format_score(s.spread, metric),
        "median": lambda s: format_score(s.median, metric),
        "best lr": lambda s: f"{s.learning_rate:.2g}",
        "lr×seeds": lambda s: f"{s.settings}×{s.seeds}",
    }
    if any(summary.diverged for summary in summaries):
        columns["diverged"] = lambda s: str(s.diverged)
    return columns | {
        f"state@{next(iter(lengths)):,}" if same else "state": lambda s: (
            format_bytes(s.state_size) + ("" if same or s.state_length is None else f" @{s.state_length:,}")
        ),
        "params": lambda s: format_count(s.parameters),
        "tokens/s": lambda s: format_count(s.tokens_per_second),
        "time": lambda s: format_seconds(s.seconds),
    }


def _slice_columns(summaries: Sequence[Summary], width: int) -> list[Columns]:
    """Returns the columns of each block of slices, as many to a block as the width takes."""
    names = slice_order(name for summary in summaries for name in summary.by_slice)
    room = width - min(40, max(len("architecture"), *(len(summary.label) for summary in summaries)))
    blocks: list[Columns] = []
    used = room
    for name in names if len(names) > 1 else []:
        needed = max(len(name), 6) + len(GAP)
        if used + needed > room:
            blocks.append({})
            used = 0
        blocks[-1][name] = functools.partial(_slice_score, name)
        used += needed
    return blocks


def _slice_score(name: str, summary: Summary) -> str:
    return format_score(summary.by_slice.get(name, math.nan), summary.metric)


def _aligned(summaries: Sequence[Summary], columns: Columns, width: int) -> str:
    """Returns a block: labels on the left, numbers on the right of their columns."""
    rows = [["architecture", *columns]]
    rows += [[summary.label, *(text(summary) for text in columns.values())] for summary in summaries]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(LEAST_LABEL, width - sum(widths[1:]) - len(GAP) * len(columns)))
    lines = []
    for label, *cells in rows:
        numbers = [cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True)]
        lines.append(GAP.join([_shortened(label, widths[0]).ljust(widths[0]), *numbers]))
    lines.insert(1, GAP.join("-" * size for size in widths))
    return "\n".join(lines)


def _shortened(label: str, limit: int) -> str:
    """Returns a label without its middle where it is too long: architectures differ in both ends most."""
    half = (limit - 1) // 2
    return label if len(label) <= limit else label[: limit - 1 - half] + "…" + label[-half:]
