"""Paths that a user typed: "~" is replaced, and what cannot be looked at is an error that names the path."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

from recollect.configuration.base import UserError
from recollect.configuration.machine import expanded


class PathError(UserError, argparse.ArgumentTypeError):
    """A path argument is none; argparse shows what it says."""


def path(text: str) -> Path:
    """Returns a path argument of the command line, with "~" replaced."""
    try:
        return expanded(text, repr(text))
    except UserError as error:
        raise PathError(str(error)) from None


def path_kind(path: Path, said: str) -> str | None:
    """Returns "file", "folder" or "other" of what is at a path; None where there is nothing.

    Python 3.11's `Path.is_file` and the like raise where a folder may not be entered or a name is too long.

    Args:
      path: where to look.
      said: how the error begins.

    Raises:
      UserError: one cannot look there.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
