"""Writes a run's newest checkpoint as safetensors and config.json."""

from __future__ import annotations

import argparse
from typing import Any

import chz

from recollect.commands import add_with
from recollect.commands.user_code import load_files
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("run", type=path)
    parser.add_argument("out", type=path)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.data.tokenizers import TOKENIZER_FILE
    from recollect.export.safetensors_format import export_safetensors
    from recollect.models.adaptation import merged
    from recollect.training.checkpoint.load import open_run

    load_files(options, options.run)
    run = open_run(options.run)
    tokenizer = run.data.tokenizer
    params, model = merged(run.params, run.experiment.model, run.vocabulary)
    extra: dict[str, Any] = {"step": run.step, "vocabulary": run.vocabulary}
    if tokenizer is not None:
        corpus = {"source": run.data.source, "digest": run.data.digest}
        extra |= {"tokenizer": tokenizer.identity(), "corpus": corpus}
    files = {} if tokenizer is None or tokenizer.file is None else {TOKENIZER_FILE: tokenizer.file}
    export_safetensors(params, chz.replace(run.experiment, model=model), options.out, extra=extra, files=files)
    print("exported: " + ", ".join(str(options.out / name) for name in ("model.safetensors", "config.json", *files)))
    return 0
