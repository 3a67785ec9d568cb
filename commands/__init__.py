"""The commands of the command line, one per file: its options, and the function that runs it. Here: what they share."""

from __future__ import annotations

import argparse
from typing import Any


def add_with(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--with FILE.py`."""
    text = "a file of yours that defines mixers (it is run)"
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="FILE.py", help=text)


def add_overrides(parser: argparse.ArgumentParser, example: str = "optimizer.learning_rate=3e-4") -> None:
    """Adds the `path=value` arguments."""
    text = f"for example {example}; `describe NAME --config` lists every field"
    parser.add_argument("overrides", nargs="*", default=[], metavar="path=value", help=text)


def experiment_of(options: argparse.Namespace) -> Any:
    """Returns the experiment that was named, with its overrides."""
    from recollect.configuration.python_files import USER_FILES

    if options.extra or ".py" in options.experiment or USER_FILES:
        from recollect.commands.user_code import user_experiment

        return user_experiment(options)
    from recollect.configuration import apply_overrides
    from recollect.experiments.registry import load

    return apply_overrides(load(options.experiment, "experiment"), options.overrides, print)
