"""The commands of the command line, one per file: its options, and the function that runs it. This file holds what
several of them share."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any


def add_with(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--with FILE.py`."""
    text = "a file of yours that defines mixers (it is run)"
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="FILE.py", help=text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the `path=value` arguments."""
    text = "for example optimizer.learning_rate=3e-4; `describe NAME --config` lists every field"
    parser.add_argument("overrides", nargs="*", metavar="path=value", help=text)


def load_files(options: argparse.Namespace) -> list[ModuleType]:
    """Runs the `--with` files and returns their modules."""
    if not options.extra:
        return []
    from recollect.configuration.python_files import load_definitions

    return [load_definitions(Path(path)) for path in options.extra]


def experiment_of(options: argparse.Namespace) -> Any:
    """Returns the experiment that was named, with its overrides."""
    from recollect.configuration import apply_overrides
    from recollect.experiments.registry import load

    load_files(options)
    return apply_overrides(load(options.experiment, "experiment"), options.overrides, print)
