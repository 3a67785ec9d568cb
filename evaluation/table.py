"""The terminal's table of a study, and results.csv.

The table has one line an architecture, best first: mean over seeds at the best learning rate, its standard deviation,
and the median over learning rates (see evaluation/results.py). The csv has one line a run with every number as Python's
shortest text that reads back as the same float.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.evaluation.results import RunResult, Summary, group_by_label, slice_order

WIDTH = 120
_GAP = "  "
_LEAST_LABEL = 18

Column = tuple[str, Callable[[Summary], str]]


def format_table(summaries: Sequence[Summary], width: int = WIDTH) -> str:
    """The table as text, no line longer than `width` (at least 110; long labels lose their middle); slices in a second
    block, where there are several.

    Recall and text architectures get a table each, because their scores cannot be compared.

    Raises:
      UserError: there are no summaries.
    """
    if not summaries:
        raise UserError("there are no finished runs to tabulate")
    parts = []
    for metric in dict.fromkeys(summary.metric for summary in summaries):
        chosen = [summary for summary in summaries if summary.metric == metric]
        chosen.sort(key=lambda s: _worst_last(s.best, metric))
        parts.append(_aligned(chosen, _columns(chosen), width))
        parts.extend(_slice_blocks(chosen, width))
    return "\n\n".join(parts)


def print_table(summaries: Sequence[Summary], say: Callable[[str], Any] = print) -> None:
    """Says `format_table`."""
    say(format_table(summaries))


def write_csv(path: Path | str, runs: Sequence[RunResult]) -> None:
    """Writes one row a run, in the order given; replaces the file as a whole.

    Columns: what every run has first, then state_bytes[LENGTH], accuracy[SLICE], bits[SLICE], loss[SLICE] and
    override[PATH], each for all that any run has; an empty cell where a run has none.

    Raises:
      UserError: there are no runs, or the file cannot be written.
    """
    if not runs:
        raise UserError("there are no finished runs to write")
    labels = {id(run): label for label, members in group_by_label(runs).items() for run in members}
    rows = [_row(run, labels[id(run)]) for run in runs]
    families = [family for run in runs for family in _families(run)]
    keyed = {
        f"{family}[{key}]": None
        for family in ("state_bytes", "accuracy", "bits", "loss", "override")
        for key in _ordered(family, [key for name, found in families if name == family for key in found])
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*_SCALARS, *keyed], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def format_bytes(size: float | None) -> str:
    """1,023 B, 12.3 KiB, 4.5 MiB; '-' for None."""
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
    """1,234,567, then 12.3M, 4.5G; '-' for NaN."""
    if math.isnan(number):
        return "-"
    if number < 1e7:
        return f"{number:,.0f}"
    return f"{number / 1e6:,.1f}M" if number < 999.95e6 else f"{number / 1e9:,.1f}G"


def format_seconds(seconds: float) -> str:
    """12.3s, 4m 05s, 3h 20m."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}h {minutes:02d}m"


def format_score(value: float, metric: str) -> str:
    """Accuracy as a percentage, bits per byte with three decimals; '-' for NaN."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.3f}"


def _worst_last(score: float, metric: str) -> tuple[bool, float]:
    return math.isnan(score), -score if metric == "accuracy" else score


def _columns(summaries: Sequence[Summary]) -> list[Column]:
    metric = summaries[0].metric
    lengths = {summary.state_length for summary in summaries}
    same = len(lengths) == 1 and None not in lengths
    columns: list[Column] = [
        ("accuracy %" if metric == "accuracy" else "bits/byte", lambda s: format_score(s.best, metric)),
        ("± sd", lambda s: format_score(s.spread, metric)),
        ("median", lambda s: format_score(s.median, metric)),
        ("best lr", lambda s: f"{s.learning_rate:.2g}"),
        ("lr×seeds", lambda s: f"{s.settings}×{s.seeds}"),
    ]
    if any(summary.diverged for summary in summaries):
        columns.append(("diverged", lambda s: str(s.diverged)))
    columns += [
        (f"state@{next(iter(lengths)):,}" if same else "state", lambda s: _state(s, same)),
        ("params", lambda s: format_count(s.parameters)),
        ("tokens/s", lambda s: format_count(s.tokens_per_second)),
        ("time", lambda s: format_seconds(s.seconds)),
    ]
    return columns


def _state(summary: Summary, same: bool) -> str:
    text = format_bytes(summary.state_size)
    return text if same or summary.state_length is None else f"{text} @{summary.state_length:,}"


def _slice_blocks(summaries: Sequence[Summary], width: int) -> list[str]:
    metric = summaries[0].metric
    names = slice_order(name for summary in summaries for name in summary.by_slice)
    if len(names) < 2:
        return []
    columns = [_slice_column(name, metric) for name in names]
    room = width - min(40, max(len("architecture"), *(len(summary.label) for summary in summaries)))
    blocks, current = [], columns[:0]
    used = 0
    for column in columns:
        needed = max(len(column[0]), 6) + len(_GAP)
        if current and used + needed > room:
            blocks.append(current)
            current, used = [], 0
        current = [*current, column]
        used += needed
    return [_aligned(summaries, block, width) for block in [*blocks, current]]


def _slice_column(name: str, metric: str) -> Column:
    return name, lambda s: format_score(s.by_slice.get(name, math.nan), metric)


def _aligned(summaries: Sequence[Summary], columns: Sequence[Column], width: int) -> str:
    rows = [["architecture", *(header for header, _ in columns)]]
    rows += [[summary.label, *(show(summary) for _, show in columns)] for summary in summaries]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    widths[0] = min(widths[0], max(_LEAST_LABEL, width - sum(widths[1:]) - len(_GAP) * len(columns)))
    lines = []
    for row in rows:
        cells = [_shortened(row[0], widths[0]).ljust(widths[0])] + [
            cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append(_GAP.join(cells).rstrip())
    lines.insert(1, _GAP.join("-" * size for size in widths))
    return "\n".join(lines)


def _shortened(label: str, limit: int) -> str:
    """Both ends tell architectures apart, the middle least."""
    if len(label) <= limit:
        return label
    half = (limit - 1) // 2
    return label[: limit - 1 - half] + "…" + label[-half:]


_SCALARS = (
    *(
        "folder",
        "name",
        "label",
        "status",
        "learning_rate",
        "seed",
        "accuracy",
        "bits_per_byte",
        "loss",
        "chance",
        "steps",
        "seconds",
    ),
    *("examples_per_second", "tokens_per_second", "parameters"),
)


def _row(run: RunResult, label: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: label if name == "label" else getattr(run, name) for name in _SCALARS}
    for family, found in _families(run):
        row |= {f"{family}[{key}]": value for key, value in found.items()}
    return {name: _cell(value) for name, value in row.items()}


def _families(run: RunResult) -> list[tuple[str, dict[Any, Any]]]:
    return [
        ("state_bytes", run.state_bytes),
        ("accuracy", run.accuracy_by_slice),
        ("bits", run.bits_by_slice),
        ("loss", run.loss_by_slice),
        ("override", run.overrides),
    ]


def _ordered(family: str, keys: list[Any]) -> list[Any]:
    if family in ("state_bytes", "override"):
        return sorted(set(keys))
    return slice_order(keys)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
