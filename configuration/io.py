"""Files that are written whole or not at all, JSON, digests, dotted names, error lines: the one copy of each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recollect.configuration.disk_full import DiskFull, is_disk_full

TEMPORARY = ".writing-"
"""What the name of a file starts with until it is whole; a process that was killed may leave one."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what is written there replaces `path` as a whole, or not at all.

    The file is flushed to the disk before it is renamed.

    Raises:
      DiskFull: no space is left; the file that was at `path` stays.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_disk_full(error):
            raise DiskFull(f"{path} could not be written: {error.strerror}") from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file (UTF-8) or nothing; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, indent: int = 2) -> None:
    """Writes a whole JSON file or nothing; raises as `replacing` does."""
    replace_text(Path(path), json.dumps(data, indent=indent) + "\n")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flatten(tree: Any, prefix: str = "", leaf: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
    """Returns {"a.b.0": value} for nested dicts and lists, in their order, with `leaf` applied to each value."""
    if not isinstance(tree, dict | list):
        return {prefix: leaf(tree)}
    flat: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name), leaf)
    return flat


def first_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an error's message, cut to `limit` characters; its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
