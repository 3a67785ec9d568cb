"""Times this project's parts, beside peers where they can be had."""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path

from recollect.configuration.base import UserError

BENCHMARKS = {
    "kernels": "kernels",
    "device": "device",
    "head-mixture": "head_mixture",
    "recall": "recall_training",
    "field": "field",
    "cold-start": "cold_start",
    "decomposition": "decomposition",
    "pretraining": "pretraining",
    "generation": "generation",
    "recurrences": "recurrences",
    "caches": "caches",
}
"""Name of each benchmark: its module in benchmarks/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options: those of `bench NAME` are the benchmark's own."""


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    name, *arguments = options.overrides or [None]
    if name in ("-h", "--help"):
        print("usage: bench NAME [options]; `bench NAME --help` lists a benchmark's options")
        for known, module in BENCHMARKS.items():
            print(f"  {known:14} {_summary(module)}")
        return 0
    if name not in BENCHMARKS:
        what = "nothing" if name is None else repr(name)
        raise UserError(
            f"bench {what}: there are {', '.join(BENCHMARKS)}; `bench NAME --help` lists a benchmark's options"
        )
    return importlib.import_module(f"recollect.benchmarks.{BENCHMARKS[name]}").main(arguments)


def _summary(module: str) -> str:
    """Returns the first line of a benchmark's docstring; the module is not imported."""
    source = (Path(__file__).parent.parent / "benchmarks" / f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
