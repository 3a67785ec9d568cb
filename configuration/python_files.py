"""Python files of the user's own: the only code from outside the project that is ever run.

A file is run when the user's command line names it, or when the run folder that it names was trained with it here
(`recollect.training.user_code`). It can import modules beside it; those of the standard library and of installed
packages come first. The digest of every file that was run is kept in the cache folder: code that no command of this
user has run on this machine is never run because of what a run folder says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import inspect
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from recollect.configuration.base import Config, UserError
from recollect.configuration.io import file_sha256
from recollect.configuration.machine import PROJECT, cache_folder, expanded
from recollect.configuration.names import RETIRED
from recollect.configuration.user_paths import path_kind


@dataclasses.dataclass
class UserFile:
    """A file of the user's that was run as a module. It finds the modules beside it, as an importer in `sys.meta_path`.

    Attributes:
      path: absolute.
      digests, sources: of each file that was run for it, itself first: sha256 and content by absolute path.
      names, module: of the modules that these files became; the one of `path`.
      allowed: digests of the files that may be run; None allows all, and keeps their digests in the cache folder.
    """

    path: Path
    allowed: set[str] | None = None
    digests: dict[Path, str] = dataclasses.field(default_factory=dict)
    sources: dict[Path, bytes] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=list)
    module: ModuleType = dataclasses.field(default_factory=lambda: ModuleType("none"))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """Returns how to import a module that is beside the file and nowhere else; None for all others."""
        if path is None:
            if is_installed(name):
                return None
            path = [str(self.path.parent)]
        elif not all(Path(entry).is_relative_to(self.path.parent) for entry in path):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or (spec.origin is not None and not spec.origin.endswith(".py")):
            return None
        if spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self)
        self.names.append(name)
        return spec

    def code(self, path: Path) -> CodeType:
        """Returns a file compiled, and notes its digest."""
        source = path.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        if self.allowed is None:
            with contextlib.suppress(OSError):  # a cache that cannot be written: the run will ask for --with
                _known(digest).parent.mkdir(parents=True, exist_ok=True)
                _known(digest).touch()
        elif digest not in self.allowed:
            said = f"{path} (sha256 {digest[:12]}) is not among the files that the run was trained with"
            raise UserError(f"{said}; --with {shlex.quote(str(self.path))} runs it")
        self.digests[path], self.sources[path] = digest, source
        return compile(source, str(path), "exec", dont_inherit=True)

    def where(self, error: BaseException) -> tuple[Path, int] | None:
        """Returns the file of the user's, and the line, where an error came from: the innermost."""
        places = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            places.append((error.filename, error.lineno or 0))
        for file, line in reversed(places):
            if Path(file) in self.digests or Path(file) == self.path:
                return Path(file), line
        return None


USER_FILES: dict[Path, UserFile] = {}
"""Files of the user's that are loaded, by path: what a run that is trained now needs again."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs the very bytes whose digest is noted, and writes no compiled file."""

    def __init__(self, name: str, path: str, file: UserFile):
        super().__init__(name, path)
        self.file = file

    def get_code(self, fullname: str) -> CodeType:
        return self.file.code(Path(self.path))


def load_definitions(path: Path, allowed: set[str] | None = None) -> ModuleType:
    """Runs the file as a module and returns it; a file that was run before, and has not changed, is not run again.

    Args:
      allowed: sha256 of the only files that may be run; None: this file, and the modules beside it that it imports.

    Raises:
      UserError: there is no such file, it raises when it runs (its own error and line are named), or is not allowed.
    """
    path = expanded(path, str(path))
    if path_kind(path, str(path)) != "file":
        raise UserError(f"there is no file {path}")
    path = path.resolve()
    if path.suffix != ".py":
        raise UserError(f"{path} is not a Python file: its name does not end in .py")
    before = USER_FILES.get(path)
    if before is not None and all(digest_of(file) == digest for file, digest in before.digests.items()):
        return before.module
    forget([path])
    file = UserFile(path, allowed)
    taken = path.stem in sys.modules or is_installed(path.stem) or not path.stem.isidentifier()
    name = f"user_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path), file))
    assert spec is not None and spec.loader is not None
    file.module = importlib.util.module_from_spec(spec)
    file.names.append(name)
    USER_FILES[path] = file
    sys.modules[name] = file.module
    sys.meta_path.insert(0, file)  # type: ignore[arg-type]  # the last in effect: see `is_installed`
    try:
        with errors_named(file):
            spec.loader.exec_module(file.module)
    except BaseException:
        forget([path])
        raise
    return file.module


def file_of(cls: type) -> UserFile | None:
    """Returns the file of the user's that defines a class, itself or in a module beside it; None for other classes."""
    return next((file for file in USER_FILES.values() if cls.__module__ in file.names), None)


@contextlib.contextmanager
def errors_named(file: UserFile | None) -> Iterator[None]:
    """Turns what a user's code raises into a UserError that names its file and line; None: does nothing."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # anything a user's file can raise
        if file is None:
            raise
        place = file.where(error)
        where = f"{place[0]} fails at line {place[1]}" if place else f"{file.path} fails"
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error


def forget(paths: Sequence[Path] | None = None) -> None:
    """Unloads files of the user's (None: all): their classes are no longer known by name. A command line begins so
    where one process runs several."""
    for path in list(USER_FILES) if paths is None else paths:
        if (file := USER_FILES.pop(path, None)) is None:
            continue
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not file]
        for name in file.names:
            module = sys.modules.pop(name, None)
            for value in list(vars(module).values()) if module else []:
                if inspect.isclass(value) and issubclass(value, Config) and value.__module__ == name:
                    RETIRED.add(value)


def digest_of(path: Path) -> str | None:
    """Returns the SHA-256 of a file, hexadecimal; None where it cannot be read."""
    with contextlib.suppress(OSError):
        return file_sha256(path)
    return None


def was_run_here(digest: str) -> bool:
    """Returns whether a command of this user has run a file of this sha256 on this machine."""
    return len(digest) == 64 and digest.isalnum() and _known(digest).exists()


def _known(digest: str) -> Path:
    return cache_folder() / "user_code" / digest


def is_installed(name: str) -> bool:
    """Returns whether a module of this name is the standard library's or an installed package's: the current folder and
    the checkout, which Python puts before them, do not count."""
    if name in sys.stdlib_module_names or name == "recollect":
        return True
    own = (Path.cwd(), PROJECT)
    entries = [entry for entry in sys.path if entry and Path(entry).resolve() not in own]
    if importlib.machinery.PathFinder.find_spec(name, entries) is not None:
        return True
    editable = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("__editable__")]
    return any(finder.find_spec(name, None) is not None for finder in editable)
