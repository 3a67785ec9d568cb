"""Finds damage in a folder that orbax_folder.py sealed with the SHA-256 of each of its files."""

from __future__ import annotations

from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.read_json import read_json
from recollect.training.checkpoint.orbax_folder import DIGESTS, digests_of


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
        digests = digests_of(folder, list(sealed))
    except OSError as error:
        return f"a file cannot be read ({error.strerror})"
    wrong = [name for name, row in sealed.items() if digests[name] != row]
    return f"{wrong[0]} does not match its SHA-256 ({len(wrong)} of {len(sealed)} files)" if wrong else None
