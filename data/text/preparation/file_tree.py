"""The files below a folder: links followed once, hidden ones left out, and every name one that can be printed."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

from recollect.configuration import UserError


@dataclasses.dataclass(frozen=True)
class FoundFile:
    """A file of a source.

    Attributes:
      path: of the file.
      name: path from the source's folder, with "/", in characters that UTF-8 can write.
      size: bytes.
      modified: time in nanoseconds.
      problem: why it cannot be read, if it is no regular file, or is another one's second name.
    """

    path: Path
    name: str
    size: int
    modified: int
    problem: str | None = None


def found_file(path: Path, name: str) -> FoundFile:
    """Returns the facts of a file; raises UserError where it cannot be looked at."""
    name = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    try:
        state = path.stat()
    except FileNotFoundError:
        return FoundFile(path, name, 0, 0, "a link to nothing")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    problem = None if stat.S_ISREG(state.st_mode) else "neither a file nor a folder"
    return FoundFile(path, name, state.st_size, state.st_mtime_ns, problem)


def files_below(root: Path, excluded: Callable[[str], bool] = lambda name: False) -> list[FoundFile]:
    """Returns the files below a folder in the order of their names, without hidden ones.

    Links are followed once each, after all that is really there: a link to what was found already, a loop above all,
    gives nothing more.

    Args:
      root: the folder.
      excluded: whether a file, or a folder ("name/"), is not looked at.

    Raises:
      UserError: a folder or file can't be looked at; what is in it can't be known.
    """
    seen = {os.path.realpath(root)}
    files: list[FoundFile] = []
    links = _walk(root, "", seen, files, excluded)
    while links:
        path, name = links.pop(0)
        target = os.path.realpath(path)
        if target in seen:
            continue
        seen.add(target)
        if os.path.isdir(target):
            links += _walk(path, f"{name}/", seen, files, excluded)
        else:
            files.append(found_file(path, name))
    return sorted(files, key=lambda file: file.name)


def _walk(
    top: Path, prefix: str, seen: set[str], files: list[FoundFile], excluded: Callable[[str], bool]
) -> list[tuple[Path, str]]:
    """Appends the files below a folder, and returns the links, which it doesn't follow."""
    waiting = [(top, prefix, os.path.realpath(top))]
    links = []
    while waiting:
        folder, prefix, real_folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{folder}: the folder cannot be read ({error.strerror})"
                + (f"; --exclude '{prefix}*' leaves it out" if prefix else "")
            ) from error
        for entry in listed:
            path, name = folder / entry.name, prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_hidden(entry.name) or excluded(f"{name}/" if is_folder else name):
                continue
            if entry.is_symlink():
                links.append((path, name))
                continue
            real = os.path.join(real_folder, entry.name)
            if real in seen:
                continue
            seen.add(real)
            if is_folder:
                waiting.append((path, f"{name}/", real))
            else:
                files.append(found_file(path, name))
    return sorted(links, key=lambda link: link[1])


def is_hidden(name: str) -> bool:
    """Returns whether files and folders of this name are never looked at."""
    return name.startswith(".") or name == "__pycache__"
