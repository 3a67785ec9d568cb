"""A folder that is held, claimed for one preparation and cleared of what killed processes left in it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import TEMPORARY
from recollect.data.text.preparation.manifest import (
    LOCK,
    MANIFEST,
    PARTS,
    PLAN,
    TOKENIZER_FILE,
    read_sealed,
    write_sealed,
)

Log = Callable[[str], Any]


@contextlib.contextmanager
def locked(out: Path, log: Log) -> Iterator[None]:
    """Holds the folder, made if need be, against other processes of this machine."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; a cache can be elsewhere: set RECOLLECT_CACHE"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is preparing {out}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Two at once would do the work twice, with the same result.
            log(f"{out}: this file system has no locks; make sure that nobody else prepares it")
        yield


def claim(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Returns the plan of the folder, written now where it was empty; raises UserError where it holds something else.

    It is `plan` but for the name of the source, which may have been written otherwise.
    """
    others = sorted(path.name for path in out.iterdir() if path.name != LOCK and not path.name.startswith(TEMPORARY))
    if not (out / PLAN).exists():
        if others:
            raise UserError(f"{out}: holds {others[0]} and is no prepared text; choose a new or empty folder")
        return _write_plan(out, plan)
    existing = read_sealed(out / PLAN)
    if existing is None:
        raise UserError(f"{out / PLAN}: is not as it was written; remove {out} and prepare again")
    if existing["key"] != plan["key"] and not _has_work(out):
        (out / TOKENIZER_FILE).unlink(missing_ok=True)
        return _write_plan(out, plan)
    if existing["key"] != plan["key"]:
        differing = ", ".join(
            f"{field} {existing.get(field)!r}"
            for field in plan
            if field != "key" and existing.get(field) != plan[field]
        )
        raise UserError(
            f"{out}: was prepared from something else ({differing}); choose another folder, or remove this one"
        )
    return existing


def _write_plan(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan of a folder and returns it."""
    write_sealed(out / PLAN, plan)
    return plan


def _has_work(out: Path) -> bool:
    """Returns whether a task was done in a folder; where none was, another preparation may have it."""
    return (out / MANIFEST).exists() or any((out / PARTS).glob("*.json"))


def remove_unfinished(out: Path) -> None:
    """Removes what killed processes were writing."""
    for path in [*out.glob(f"{TEMPORARY}*"), *(out / PARTS).glob(f"{TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
