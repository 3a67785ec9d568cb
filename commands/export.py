"""Writes a run's newest checkpoint as safetensors and config.json."""

from __future__ import annotations

import argparse

from recollect.commands import add_with, load_files, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("run", type=path)
    parser.add_argument("out", type=path)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.export.safetensors_format import export_safetensors
    from recollect.training.checkpoint.load import open_run

    load_files(options)
    run = open_run(options.run)
    export_safetensors(run.params, run.experiment, options.out, extra={"step": run.step})
    print(f"exported: {options.out / 'model.safetensors'}, {options.out / 'config.json'}")
    return 0
