"""The page itself: one HTML file that holds its data, style and script, and asks nothing of a network."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import replace_text
from recollect.evaluation.report.gather import gather
from recollect.evaluation.results import find_runs
from recollect.evaluation.table import printable

PARTS = Path(__file__).parent
SCRIPTS = ("elements.js", "charts.js", "figures.js", "atlas.js", "runs.js", "page.js")


def write_report(paths: Sequence[Path | str], out: Path, title: str | None = None, refresh: int | None = None) -> int:
    """Writes the page about the runs that `paths` name (see `find_runs`), finished or not; returns how many it shows.

    Args:
      title: heading of the page; None: the names of the paths.
      refresh: seconds after which an open page loads itself again; None: never.

    Raises:
      UserError: there is no run, a config.json is broken, or the file cannot be written.
    """
    folders = find_runs([str(path) for path in paths], unfinished=True)
    data = gather(folders)
    data["written"] = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    data["title"] = title or ", ".join(Path(path).resolve().name for path in paths)
    data["refresh"] = refresh
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, render(data))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    return len(folders)


def render(data: dict) -> str:
    """Returns the page of what `gather` returned. All text of the user's stands in the data, in which no "<" is left:
    it cannot end the element that holds it, and the script shows it as text."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = (PARTS / "template.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(printable(data["title"])),
        "STYLE": (PARTS / "style.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "DATA": text,  # last: what stands in it is not looked at again
    }
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    return page
