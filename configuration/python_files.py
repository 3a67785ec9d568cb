"""Python files of the user's own, given by path: the only code from outside the project that is ever run."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from recollect.configuration.base import UserError
from recollect.configuration.machine import expanded


def load_definitions(path: Path) -> ModuleType:
    """Runs the file as a module and returns it.

    Raises:
      UserError: there is no such file, or it raises when it runs (its own error and line are named).
    """
    path = expanded(path, f"--with {path}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    name = f"with_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # anything a user's file can raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f"line {lines[-1]}" if lines else "its import"
        raise UserError(f"{path} fails at {where}: {type(error).__name__}: {error}") from error
    return module
