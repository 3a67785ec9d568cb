"""Describes an experiment without data: parameters, FLOPs, state bytes and a compile check."""

from __future__ import annotations

import argparse
import os

from recollect.commands import add_overrides, add_with, experiment_of
from recollect.configuration.base import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("experiment", help="a name that `list` shows, or FILE.py[:NAME]")
    text = "print every field as path=value, with what it means"
    parser.add_argument("--config", action="store_true", help=text)
    text = "leave out the compilation of the training step"
    parser.add_argument("--no-compile", dest="compile", action="store_false", help=text)
    parser.add_argument(
        "--target",
        metavar="tpu:v5e:2x2|h100",
        help="compile ahead of time for this slice or GPU (needs libtpu or XLA's CUDA plugin): "
        "memory, collectives, traffic and times per device",
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.target is not None:
        # Read when jax is imported: libtpu would otherwise ask a metadata server that only Google's machines have.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.target is not None and not options.compile:
        raise UserError("--no-compile: --target says what to compile for; give one of the two")
    experiment = experiment_of(options)
    if options.config:
        from recollect.configuration.field_docs import documented_fields

        for path, value, text in documented_fields(experiment):
            print(f"{path}={value}".ljust(43), text)
        return 0
    from recollect.cost.describe import describe

    describe(experiment, target=options.target, compiled=options.compile, log=print)
    return 0
