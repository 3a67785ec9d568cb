"""Trains one experiment; the same command resumes it."""

from __future__ import annotations

import argparse

from recollect.commands import add_overrides, add_with, experiment_of
from recollect.evaluation.metrics import METRICS

SHOWN = (
    *(*METRICS, "loss", "status", "steps", "seconds", "examples_per_second", "tokens_per_second", "mfu"),
    "waiting_for_data",
)
"""Entries of result.json that `train` prints."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("experiment", help="a name that `list` shows, or FILE.py[:NAME]")
    text = "train a study of this experiment: at each value, and at every combination of several"
    parser.add_argument("--sweep", action="append", default=[], metavar="path=v1,v2,...", help=text)
    text = "of process 0, when several processes train together (docs/clusters.md)"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=text)
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes train together")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    experiment = experiment_of(options)
    if options.sweep:
        from recollect.commands.train_sweep import train_sweep

        return train_sweep(experiment, options)
    from recollect.training.distributed.host import joined
    from recollect.training.train import run_directory, train

    log = print
    if experiment.run.directory is None and (run_directory(experiment) / "config.json").exists():
        from recollect.training.variant_folder import with_folder

        experiment, log = with_folder(experiment)
    with joined(options.coordinator, options.processes, options.process) as host:
        result = train(experiment, log)
        if host.is_main:
            shown = {name: result[name] for name in SHOWN if name in result}
            texts = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in shown.items()}
            print(", ".join(f"{name} {text}" for name, text in texts.items()))
            print(f"result: {run_directory(experiment) / 'result.json'}")
    return 3 if result["status"] == "diverged" else 0
