"""Writes one HTML page about a study or some runs, finished or not."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from recollect.configuration.user_paths import path

EVERY = 5
"""Seconds between two looks at the folders with --watch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("folders", nargs="+", metavar="RUN_OR_STUDY", help="folders of runs, or of studies, or globs")
    parser.add_argument(
        "--out", type=path, metavar="FILE.html", help="the page (default: report.html in the first folder)"
    )
    parser.add_argument("--title", help="heading of the page (default: names of the folders)")
    parser.add_argument(
        "--watch", action="store_true", help="write it again whenever a run goes on, until all have ended or Ctrl-C"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.configuration import UserError
    from recollect.evaluation.report import write_report
    from recollect.evaluation.results import find_runs

    first = path(options.folders[0])
    out = options.out or (first if first.is_dir() else Path()) / "report.html"
    if out.suffix != ".html" or out.is_dir():
        example = out.with_suffix(".html") if out.name else out / "report.html"
        raise UserError(f"--out {out}: must be a file whose name ends in .html, for example {example}")
    refresh = EVERY if options.watch else None
    seen = None
    while True:
        state = _state(find_runs(options.folders, unfinished=True))
        going = options.watch and not all(ended for *_, ended in state)
        if state != seen:
            count = write_report(options.folders, out, options.title, refresh if going else None)
            print(f"report: {out} ({count} run{'s' if count > 1 else ''})")
            seen = state
        if not going:
            return 0
        try:
            time.sleep(EVERY)
        except KeyboardInterrupt:
            write_report(options.folders, out, options.title)
            return 0


def _state(folders: list[Path]) -> list[tuple[str, float, bool]]:
    """Returns of each run when it last wrote, and whether it has ended: what tells whether the page is up to date."""
    state = []
    for folder in folders:
        files = [folder / name for name in ("metrics.jsonl", "result.json")]
        changed = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
        state.append((str(folder), changed, files[1].exists()))
    return state
