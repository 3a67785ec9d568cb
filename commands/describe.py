"""Describes an experiment without data: parameters, FLOPs, state bytes and a compile check."""

from __future__ import annotations

import argparse
import os

from recollect.commands import add_overrides, add_with, experiment_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("experiment")
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
    experiment = experiment_of(options)
    from recollect.cost.describe import describe

    describe(experiment, target=options.target, log=print)
    return 0
