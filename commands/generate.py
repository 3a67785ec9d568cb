"""Continues prompts with a text model, as text while it is generated, or as JSON with log-probabilities."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration.base import UserError
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument(
        "run", type=path, help="a run's folder (RUN:500: its step 500), an export, a Hugging Face folder"
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", metavar="TEXT", help='may be repeated (default: "def ")')
    texts.add_argument("--prompts", type=path, metavar="FILE", help="one prompt per line; empty lines are skipped")
    parser.add_argument("--tokens", type=int, default=200, help="to generate after each prompt at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="likeliest tokens of this share together (0.95)")
    parser.add_argument("--top-k", type=int, help="so many of the likeliest tokens only (default: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="tokens at least this share of the likeliest one (0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="on tokens that are there (1: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn tokens (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a continuation; may be repeated"
    )
    parser.add_argument("--logprobs", action="store_true", help="JSON, a line per prompt: tokens, log-probabilities")
    add_overrides(parser, "model.dtype=bfloat16")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.models.sampling import Sampling
    from recollect.models.text_generation import continue_texts
    from recollect.training.checkpoint.load import open_text_run

    load_files(options, options.run)
    sampling = Sampling(
        options.temperature, options.top_p, options.top_k, options.min_p, options.repetition_penalty, options.seed
    )
    prompts = _prompts(options.prompts) if options.prompts else options.prompt or ["def "]
    model, params, tokenizer = open_text_run(options.run, options.overrides)
    parts = continue_texts(model, params, tokenizer, prompts, options.tokens, sampling, options.stop)
    if options.logprobs:
        _print_json(prompts, parts)
    else:
        _print_text(prompts, parts)
    return 0


def _prompts(file: Path) -> list[str]:
    """Returns the lines of a file, without empty ones."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    if not lines:
        raise UserError(f"{file}: holds no prompt; one per line is read")
    return lines


def _print_text(prompts: list[str], parts: Iterator[Any]) -> None:
    """Prints each prompt with its continuation as it comes: the first one that is not done, then those that wait."""
    waiting, finished, at = [""] * len(prompts), set[int](), 0
    for number, part in enumerate(parts):
        if number == 0:
            print(prompts[0], end="")
        waiting[part.row] += part.text
        if part.finish:
            finished.add(part.row)
        while at < len(prompts):
            print(waiting[at], end="", flush=True)
            waiting[at] = ""
            if at not in finished:
                break
            at += 1
            print("\n\n" + prompts[at] if at < len(prompts) else "\n", end="")


def _print_json(prompts: list[str], parts: Iterator[Any]) -> None:
    """Prints a JSON object per prompt, in the order of the prompts, once all are done."""
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "text": "", "finish": None, "tokens": [], "logprobs": []} for prompt in prompts
    ]
    for part in parts:
        row = rows[part.row]
        row["text"] += part.text
        row["finish"] = part.finish
        row["tokens"] += part.tokens
        row["logprobs"] += part.log_probabilities
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
