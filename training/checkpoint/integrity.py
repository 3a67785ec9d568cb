"""Seals a folder with the SHA-256 of each of its files, and finds damage later."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import file_sha256, read_json, write_json

DIGESTS = "digests.json"
"""The file of a sealed folder that lists its other files: {"sha256": {name: [bytes, digest]}}."""


def seal(folder: Path) -> None:
    """Writes size and SHA-256 of every file below `folder` into its digests.json, last, after flushing the files to
    the disk."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        # What another process wrote on a shared disk is flushed too: the page cache is the file's, not the writer's.
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / DIGESTS, {"sha256": _digests(folder, names)})


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a sealed folder, in words that name the file; None: every file is what was sealed."""
    if not (folder / DIGESTS).exists():
        return f"it has no {DIGESTS}: it was never finished, or the file was deleted"
    try:
        rows = read_json(folder / DIGESTS)["sha256"].items()
        sealed = {name: (int(size), str(digest)) for name, (size, digest) in sorted(rows)}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS} cannot be read"
    for name, (size, _) in sealed.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    try:
        digests = _digests(folder, list(sealed))
    except OSError as error:
        return f"a file cannot be read ({error.strerror})"
    wrong = [name for name, row in sealed.items() if digests[name] != row]
    return f"{wrong[0]} does not match its SHA-256 ({len(wrong)} of {len(sealed)} files)" if wrong else None


def _digests(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    def one(name: str) -> tuple[int, str]:
        return (folder / name).stat().st_size, file_sha256(folder / name)

    # hashlib lets other threads run; four read a large checkpoint about four times as fast.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
