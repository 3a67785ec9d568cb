"""Continues a prompt with a text model."""

from __future__ import annotations

import argparse

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration.user_paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument("run", type=path)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--length", type=int, default=200, help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.training.checkpoint.load import continue_prompt

    load_files(options, options.run)
    sampling = options.length, options.temperature, options.top_p, options.seed
    print(continue_prompt(options.run, options.overrides, options.prompt, *sampling))
    return 0
