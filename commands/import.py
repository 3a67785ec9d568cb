"""Reads a Hugging Face folder into an export of this project: `generate`, `evaluate`, `run.initialize` take it."""

from __future__ import annotations

import argparse

from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("folder", type=path, help="config.json, model.safetensors and, of text, tokenizer.json")
    parser.add_argument("out", type=path, help="a new folder, or with --overwrite an export")
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is in OUT")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.configuration import UserError
    from recollect.training.checkpoint.exported import write_safetensors
    from recollect.training.checkpoint.load import open_run

    if not options.folder.is_dir():
        problem = "is a file" if options.folder.exists() else "is not there"
        raise UserError(f"{options.folder} {problem}; import reads a folder of Hugging Face's, with config.json")
    run = open_run(options.folder)
    names = write_safetensors(run, options.out, overwrite=options.overwrite)
    print("imported: " + ", ".join(str(options.out / name) for name in names))
    return 0
