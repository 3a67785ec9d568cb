"""Evaluates a run's newest checkpoint: on its own data, whole or streamed, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration import UserError
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument(
        "run", type=path, help="a run's folder (RUN:500: its step 500), an export, a Hugging Face folder"
    )
    parser.add_argument("--streamed", action="store_true", help="token by token through the decoding state")
    parser.add_argument(
        "--prefill", type=at_least(1), metavar="N", help="streamed: first tokens that are given at once (default: 0)"
    )
    text = "streamed: search the first --prefill tokens window by window, and keep sentences (docs/caches.md)"
    parser.add_argument("--infini-retri", metavar="window=N,top=N,...", help=text)
    parser.add_argument("--tasks", metavar="NAME,NAME", help="tasks of lm_eval, which must be installed")
    parser.add_argument("--include-path", type=path, metavar="FOLDER", help="tasks: of further ones, in YAML")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="tasks: examples of each")
    parser.add_argument("--shots", type=at_least(0), metavar="N", help="tasks: examples before each question")
    parser.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="tasks: texts at once")
    add_overrides(parser, "data.evaluation_examples=128")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.configuration.read_json import finite
    from recollect.training.checkpoint.load import evaluate_run

    load_files(options, options.run)
    if options.prefill and not options.streamed:
        raise UserError("--prefill is of streamed evaluation: add --streamed")
    if options.infini_retri is not None and not options.prefill:
        raise UserError("--infini-retri searches the context that a question is about: add --streamed --prefill N")
    if options.streamed and options.tasks is not None:
        raise UserError("--streamed evaluates on the run's own data; --tasks does not stream")
    if options.tasks is not None:
        print(json.dumps(finite(run_harness(options)), indent=2))
        return 0
    prefill = (options.prefill or 0) if options.streamed else None
    search = None if options.infini_retri is None else options.infini_retri.split(",")
    metrics = evaluate_run(options.run, options.overrides, prefill=prefill, search=search)
    print(json.dumps(finite(metrics), indent=2))
    return 0


def run_harness(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the metrics of tasks; raises UserError where the harness is not installed."""
    from recollect.training.checkpoint.load import open_text_run

    model = open_text_run(options.run, options.overrides)
    try:
        from recollect.evaluation.harness import HarnessModel, run_tasks
    except ImportError as error:
        missing = f"--tasks needs lm_eval, and {error}"
        raise UserError(f"{missing}; pip install lm_eval, or see docs/interoperability.md") from error
    asked = {"include": options.include_path, "limit": options.limit, "shots": options.shots}
    results = run_tasks(HarnessModel(*model, batch_size=options.batch_size), options.tasks.split(","), **asked)
    return {"run": str(options.run), "tasks": results}


def at_least(least: int) -> Callable[[str], int]:
    """Returns argparse's type of whole numbers from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value}: at least {least} is needed")
        return value

    return number
