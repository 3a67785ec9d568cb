"""Trains what a study lacks, then writes its table and plots; or writes those of runs that exist."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import check_mixers, load_files, load_named
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    text = "a study; or folders of runs that exist (or that hold such, or globs of them), of which nothing is trained"
    parser.add_argument("study", metavar="STUDY|RUN...", help=text)
    text = "where runs, table and plots go (default: runs/STUDY; of runs that exist, runs/compared)"
    parser.add_argument("--out", type=path, metavar="DIR", help=text)
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
    text = "only these experiments of the study (and the mixers of --with), and of several tasks only these"
    parser.add_argument("--only", action="append", default=[], metavar="EXPERIMENT|TASK", help=text)
    text = "an axis: train at each value, and at every combination of several axes"
    parser.add_argument("--sweep", action="append", default=[], metavar="path=v1,v2,...", help=text)
    text = "processes that train (default: on a CPU with two cores or more, 2 where the study is long enough)"
    parser.add_argument("--at-once", type=int, metavar="N", help=text)
    parser.add_argument("--format", default="png", metavar="png,pdf,svg", help="of the figures; several: each in all")
    parser.add_argument("--titles", action="store_true", help="figures have titles")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.evaluation.plots import delete_figures, formats_of
    from recollect.experiments.user_file import is_file, label

    formats = formats_of(options.format)
    if not is_file(options.study) and _names_runs(options.study):
        from recollect.evaluation.results import find_runs
        from recollect.experiments.compare import report

        _refuse_options_of_studies(options)
        folders, out = find_runs([options.study, *options.overrides]), options.out or Path("runs/compared")
        if options.out is None:
            delete_figures(out)  # those of the comparison before, which may be of other runs
        report(folders, out, formats, options.titles)
        return 0
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
        sweeps=options.sweep,
        at_once=options.at_once,
        together=options.together,
        on=options.on,
        cpus=options.cpus_per_task,
        gpus=options.gpus_per_task,
        formats=formats,
        titles=options.titles,
    )
    return 0


def _refuse_options_of_studies(options: argparse.Namespace) -> None:
    """Raises UserError for an option that says something about training, beside runs that exist."""
    from recollect.configuration import UserError

    names = ("only", "sweep", "extra", "on", "at_once", "together", "cpus_per_task", "gpus_per_task")
    for name in names:
        if getattr(options, name) not in (None, []):
            option = "with" if name == "extra" else name.replace("_", "-")
            raise UserError(f"--{option}: is for a study, which is trained; {options.study} names runs that exist")


def _names_runs(text: str) -> bool:
    """Returns whether an argument that names no file of the user's is a path or a glob, and not the name of a study."""
    return os.sep in text or any(sign in text for sign in "*?[") or Path(text).is_dir()
