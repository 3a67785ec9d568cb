"""Times this project's parts, beside peers where they can be had."""

from __future__ import annotations

import argparse
import importlib

from recollect.configuration.base import UserError

BENCHMARKS = {
    "kernels": "kernels",
    "device": "device",
    "head-mixture": "head_mixture",
    "recall": "recall_training",
    "cold-start": "cold_start",
    "decomposition": "decomposition",
    "pretraining": "pretraining",
    "recurrences": "recurrences",
}
"""Name of each benchmark: its module in benchmarks/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options: those of `bench NAME` are the benchmark's own."""


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    name, *arguments = options.overrides or [None]
    if name not in BENCHMARKS:
        what = "nothing" if name is None else repr(name)
        raise UserError(
            f"bench {what}: there are {', '.join(BENCHMARKS)}; `bench NAME --help` lists a benchmark's options"
        )
    return importlib.import_module(f"recollect.benchmarks.{BENCHMARKS[name]}").main(arguments)
