"""Evaluates a run's newest checkpoint."""

from __future__ import annotations

import argparse
import json

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument(
        "run", type=path, help="a run's folder (RUN:500: its step 500), an export, a Hugging Face folder"
    )
    add_overrides(parser, "data.evaluation_examples=128")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.configuration.read_json import finite
    from recollect.training.checkpoint.load import evaluate_run

    load_files(options, options.run)
    print(json.dumps(finite(evaluate_run(options.run, options.overrides)), indent=2))
    return 0
