"""Files that must be whole: atomic writes, SHA-256 of every file of a folder, and telling a full disk from other
errors."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recollect.configuration import UserError

DIGESTS = "digests.json"
"""The file of a sealed folder that lists its other files."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")


class DiskFull(UserError):
    """A file could not be written because the disk (or the quota) is full."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that no space is left. Storage libraries wrap the operating
    system's error in kinds of their own, so the text counts too."""
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if any(text in str(error) for text in _FULL_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing: beside it, flushed to the disk, then renamed.

    Raises:
      DiskFull: no space is left; the file that was there stays.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(f"{path} could not be written: {error.strerror}") from error
        raise


def write_json(path: Path, data: Any) -> None:
    """Writes a whole file or nothing; raises as `replace_text` does."""
    replace_text(Path(path), json.dumps(data, indent=2, allow_nan=True) + "\n")


def seal(folder: Path) -> None:
    """Writes size and SHA-256 of every file below `folder` into its digests.json, last, after flushing the files to
    the disk."""
    write_json(folder / DIGESTS, {"sha256": _digests(folder, flush=True)})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words that name the file; None when every file is what was sealed."""
    try:
        expected = json.loads((folder / DIGESTS).read_text())["sha256"]
        items = {name: (int(size), str(digest)) for name, (size, digest) in expected.items()}
    except FileNotFoundError:
        return f"it has no {DIGESTS}: it was never finished, or the file was taken away"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGESTS} cannot be read"
    for name, (size, _) in sorted(items.items()):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    try:
        actual = _digests(folder, flush=False, names=sorted(items))
    except OSError as error:
        return f"a file cannot be read ({error.strerror})"
    wrong = [name for name, (_, digest) in sorted(items.items()) if actual[name][1] != digest]
    return f"{wrong[0]} does not match its SHA-256 ({len(wrong)} of {len(items)} files)" if wrong else None


def _digests(folder: Path, *, flush: bool, names: list[str] | None = None) -> dict[str, tuple[int, str]]:
    if names is None:
        names = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS
        )

    def one(name: str) -> tuple[int, str]:
        with (folder / name).open("rb") as file:
            if flush:
                # What another process wrote on a shared disk is flushed too: the page cache is the file's, not the
                # writer's.
                os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    # hashlib lets other threads run; four read a large checkpoint about four times as fast.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
