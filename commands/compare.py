"""Trains what a study lacks, then writes its table and plots."""

from __future__ import annotations

import argparse
from pathlib import Path

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import check_mixers, load_files, load_named
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("study")
    parser.add_argument("--out", type=path, metavar="DIR", help="where runs, table and plots go (default: runs/STUDY)")
    parser.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train members that differ in values only at once (default: on accelerators)",
    )
    parser.add_argument(
        "--on",
        metavar="ray[:ADDRESS]",
        help="train on a Ray cluster: the one at ADDRESS, else one started here (docs/clusters.md)",
    )
    parser.add_argument(
        "--cpus-per-task", type=float, metavar="N", help="with --on ray (default: CPUs shared out among the tasks)"
    )
    parser.add_argument(
        "--gpus-per-task", type=float, metavar="N", help="with --on ray (default: 1 where the cluster has GPUs)"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="EXPERIMENT", help="only these experiments of the study"
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.experiments.user_file import is_file, label

    files = load_files(options)
    study = load_named(options.study, "study")
    name = label(options.study) if is_file(options.study) else options.study
    for experiment in study.experiments:
        check_mixers(experiment)
    from recollect.experiments.compare import compare

    compare(
        study,
        name,
        options.out or Path("runs") / name,
        files=files,
        only=options.only,
        overrides=options.overrides,
        together=options.together,
        on=options.on,
        cpus=options.cpus_per_task,
        gpus=options.gpus_per_task,
    )
    return 0
