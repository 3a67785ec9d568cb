"""The terminal's table of a study, and results.csv.

The table has one line per architecture, best first: mean over seeds at the best learning rate, its standard deviation,
and the median over learning rates (see evaluation/summaries.py). The csv has one line per run with every number as
Python's shortest text that reads back as the same float.
"""

import collections
import csv
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import replacing
from recollect.evaluation.metrics import METRICS
from recollect.evaluation.results import RunResult
from recollect.evaluation.summaries import Summary, group_by_label, slice_order

WIDTH = 120
GAP = "  "
LEAST_LABEL = 18
CSV_COLUMNS = (
    *("folder", "name", "label", "status", "learning_rate", "seed", *METRICS),
    *("loss", "chance", "steps", "seconds", "examples_per_second", "tokens_per_second", "parameters"),
)
CSV_FAMILIES = ("state_bytes", *dict.fromkeys(m.by_slice for m in METRICS.values()), "loss_by_slice", "overrides")
"""Entries of result.json with a value per key: columns of the csv named `family[key]`, the family without "_by_slice"
(and `override`)."""

RATE = "optimizer.learning_rate"
ARROWS = {"highest": " ↑", "lowest": " ↓"}

Columns = dict[str, list[str]]
"""Header of each column -> its cells, one per architecture."""


def format_table(summaries: Sequence[Summary], width: int = WIDTH) -> str:
    """Returns the table as text, no line longer than `width` (at least 110; long labels lose their middle).

    Scores by slice and by learning rate follow in blocks of their own, where there are several. Each metric and each
    task has its own table under its name, because their scores do not compare. An arrow beside the best learning rate
    means that it is the highest or the lowest tried.

    Raises:
      UserError: there are no summaries.
    """
    if not summaries:
        raise UserError("there are no finished runs to tabulate")
    tables = list(dict.fromkeys((s.metric, s.task) for s in summaries))
    blocks = [f"{len(tables)} tables: scores of different tasks or metrics do not compare"] if len(tables) > 1 else []
    for table in tables:
        rows = sorted(
            (s for s in summaries if (s.metric, s.task) == table), key=lambda s: METRICS[s.metric].rank(s.best)
        )
        labels = [s.label + ("*" if s.extended else "") for s in rows]
        columns = [_columns(rows), *_slice_columns(rows, width), *_rate_columns(rows)]
        first, *others = [_aligned(labels, block, width) for block in columns]
        blocks += [f"{table[1]}\n{first}" if table[1] else first, *others, *_edge_notes(rows)]
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
    label_of = {id(run): label for label, members in group_by_label(runs).items() for run in members}
    columns = list(CSV_COLUMNS)
    rows = [
        {name: getattr(run, name, None) for name in CSV_COLUMNS} | run.scores | {"label": label_of[id(run)]}
        for run in runs
    ]
    slices = slice_order(runs)
    for entry in CSV_FAMILIES:
        family = {"overrides": "override"}.get(entry, entry.removesuffix("_by_slice"))
        values = [_by_key(run, entry) for run in runs]
        keys = dict.fromkeys(key for by_key in values for key in by_key)
        ordered = [key for key in slices if key in keys] if entry.endswith("_by_slice") else sorted(keys)
        columns += [f"{family}[{key}]" for key in ordered + [key for key in keys if key not in ordered]]
        for row, by_key in zip(rows, values, strict=True):
            row |= {f"{family}[{key}]": value for key, value in by_key.items()}
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _by_key(run: RunResult, entry: str) -> dict[Any, Any]:
    """Returns what a run has of an entry of CSV_FAMILIES."""
    metric = next((name for name in run.scores_by_slice if METRICS[name].by_slice == entry), None)
    return getattr(run, entry, {}) if metric is None else run.scores_by_slice[metric]


def format_bytes(size: float | None) -> str:
    """Formats bytes: 1,023 B, 12.3 KiB, 4.5 MiB; '-' for None."""
    if size is None:
        return "-"
    if size < 1024:
        return f"{size:,.0f} B"
    # 1,023.97 KiB would be shown as 1,024.0 KiB.
    power = next((power for power in (1, 2) if round(size / 1024**power, 1) < 1024), 3)
    return f"{size / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


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


def format_chance(chance: float) -> str:
    """Formats the score of a guess: 6.25 %."""
    return f"{100 * chance:.3g} %"


def shortened(label: str, limit: int) -> str:
    """Returns a label without its middle where it is too long: architectures differ in both ends most."""
    half = (limit - 1) // 2
    return label if len(label) <= limit else label[: limit - 1 - half] + "…" + label[-half:]


def printable(name: str) -> str:
    """Returns a name with a mark for each character that no font draws."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def _columns(summaries: Sequence[Summary]) -> Columns:
    """Returns the columns of the main block."""
    metric = METRICS[summaries[0].metric]
    lengths = {s.state_length for s in summaries}
    length = lengths.pop() if len(lengths) == 1 else None
    at = [f" @{s.state_length:,}" if length is None and s.state_length is not None else "" for s in summaries]
    columns = {
        metric.header: [metric.text(s.best) for s in summaries],
        "± sd": [metric.text(s.spread) for s in summaries],
        "median": [metric.text(s.median) for s in summaries],
        "best lr": [_rate(s) for s in summaries],
        "lr×seeds": [f"{s.settings}×{s.seeds}" for s in summaries],
        "diverged": [str(s.diverged) for s in summaries],
        "state" if length is None else f"state@{length:,}": [
            format_bytes(s.state_size) + length_shown for s, length_shown in zip(summaries, at, strict=True)
        ],
        "params": [format_count(s.parameters) for s in summaries],
        "tokens/s": [format_count(s.tokens_per_second) for s in summaries],
        "time": [format_seconds(s.seconds) for s in summaries],
    }
    if not any(s.diverged for s in summaries):
        del columns["diverged"]
    return columns


def _slice_columns(summaries: Sequence[Summary], width: int) -> list[Columns]:
    """Returns the columns of each block of slices, as many to a block as the width takes."""
    names, metric = slice_order(summaries), METRICS[summaries[0].metric]
    room = width - min(40, max(len("architecture"), *(len(summary.label) for summary in summaries)))
    blocks: list[Columns] = []
    used = room
    for name in names if len(names) > 1 else []:
        needed = max(len(name), 6) + len(GAP)
        if used + needed > room:
            blocks.append({})
            used = 0
        blocks[-1][name] = [metric.text(s.by_slice.get(name, math.nan)) for s in summaries]
        used += needed
    return blocks


def _rate(summary: Summary) -> str:
    """Returns the best learning rate, with an arrow to where a better one may lie."""
    return f"{summary.learning_rate:.2g}" + ARROWS.get(summary.edges.get(RATE, ""), "")


def _rate_columns(summaries: Sequence[Summary]) -> list[Columns]:
    """Returns the columns of the block of scores by learning rate, if there are several; of the ten rates that most
    architectures were trained at."""
    counts = collections.Counter(rate for s in summaries for rate in s.by_rate)
    if len(counts) < 2:
        return []
    rates = sorted(rate for rate, _ in counts.most_common(10))
    scores = {rate: [s.by_rate[rate].mean if rate in s.by_rate else math.nan for s in summaries] for rate in rates}
    metric = METRICS[summaries[0].metric]
    return [{f"lr {rate:.3g}": [metric.text(value) for value in scores[rate]] for rate in rates}]


def _edge_notes(summaries: Sequence[Summary]) -> list[str]:
    """Returns a block that says which runs went on, which architectures only guess, and which best values are the
    highest or the lowest tried."""
    lines = []
    if any(s.extended for s in summaries):
        lines.append(
            "* went on with more steps than its schedule had (result.json: extended), so its learning rate jumped"
        )
    guesses = [
        f"{s.label} ({format_chance(s.chance)})" for s in summaries if s.chance is not None and s.best <= s.chance
    ]
    if guesses:
        lines.append(textwrap.fill(f"no better than a guess: {', '.join(guesses)}", WIDTH))
    if any(RATE in s.edges for s in summaries):
        lines.append("↑ ↓ the best learning rate is the highest or lowest tried: a better one may lie beyond it")
    for path in sorted({path for s in summaries for path in s.edges} - {RATE}):
        for end in ("lowest", "highest"):
            labels = [s.label for s in summaries if s.edges.get(path) == end]
            if labels:
                lines.append(f"{path}: the best value is the {end} tried, of {', '.join(labels)}")
    return ["\n".join(lines)] if lines else []


def _aligned(labels: list[str], columns: Columns, width: int) -> str:
    """Returns a block: labels on the left, numbers on the right of their columns."""
    numbers = [[header, *cells] for header, cells in columns.items()]
    sizes = [max(map(len, cells)) for cells in numbers]
    rest = max(LEAST_LABEL, width - sum(sizes) - len(GAP) * len(sizes))
    first = [shortened(label, rest) for label in ["architecture", *labels]]
    left = max(map(len, first))
    padded = [[cell.ljust(left) for cell in first]]
    padded += [[cell.rjust(size) for cell in cells] for cells, size in zip(numbers, sizes, strict=True)]
    header, *lines = [GAP.join(cells) for cells in zip(*padded, strict=True)]
    return "\n".join([header, GAP.join("-" * size for size in [left, *sizes]), *lines])
