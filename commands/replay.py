"""Takes a step again that was not finite, and names the layer that broke first."""

from __future__ import annotations

import argparse

from recollect.commands import add_with
from recollect.commands.user_code import load_files
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument(
        "failure", type=path, metavar="DIR", help="a run that stopped, or the folder of a step that it names"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.training.recovery.replay import replay

    load_files(options, options.failure)
    return 0 if replay(options.failure) else 1
