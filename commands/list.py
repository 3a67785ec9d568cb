"""Lists the names of all experiments and studies."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options: there are none."""


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.experiments.registry import entries

    known = entries().values()
    for kind, title in (("experiment", "Experiments (train, describe):"), ("study", "Studies (compare):")):
        print(title)
        for entry in known:
            if entry.kind == kind:
                print(f"  {entry.name:32} {entry.summary}")
    return 0
