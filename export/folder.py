"""An export's folder: whole or not at all, and never in place of something else."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from recollect.configuration import UserError


@contextlib.contextmanager
def new_folder(directory: Path, is_exports: Callable[[str], bool], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder to fill, which is renamed to `directory` once the block ends without an error.

    Args:
      is_exports: whether an export writes a file of that name: only such files are ever replaced.
      overwrite: replace an export that is there.

    Raises:
      UserError: `directory` is a file, holds something already, or cannot be written.
    """
    directory = directory.resolve()
    _check_free(directory, is_exports, overwrite)
    temporary = directory.with_name(f".{directory.name}.new-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _move_in(temporary, directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(directory: Path, is_exports: Callable[[str], bool], overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; an export needs a folder")
    try:
        names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from error
    if names and not overwrite:
        raise UserError(
            f"{directory} is not empty; choose another folder, or --overwrite (overwrite=True) to replace an export"
        )
    foreign = sorted(name for name in names if not is_exports(name))
    if foreign:
        raise UserError(
            f"{directory} holds files that no export wrote ({', '.join(foreign[:3])}), so it is not replaced"
        )


def _move_in(temporary: Path, directory: Path) -> None:
    """Renames the finished folder to its place; the old export, if any, comes back if that fails."""
    old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(4)}")
    if directory.exists():
        os.rename(directory, old)
    try:
        os.rename(temporary, directory)
    except OSError:
        if old.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
