"""Tokenises a text source once, into a folder that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("source", help="stdlib, a text, .jsonl(.gz) or .parquet file, a folder of them, or tfds:NAME")
    parser.add_argument("out", type=Path, help="a new folder, or one that the same command left unfinished")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help="bytes, bpe:SIZE (trained here) or a tokenizer.json"
    )
    parser.add_argument(
        "--start",
        metavar="TOKEN",
        help="the token of a tokenizer.json that opens documents, if it has an unusual name",
    )
    parser.add_argument(
        "--field", default="text", metavar="NAME", help="key, column or feature that holds the text (default: text)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many work at once (default: one per core)")
    parser.add_argument("--shard-mib", type=float, metavar="N", help="text of a shard (default: 4, more from 2 GiB on)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from recollect.data.text.preparation.prepare import run as prepare

    shard_bytes = None if options.shard_mib is None else int(options.shard_mib * 2**20)
    source = options.source, options.out, options.tokenizer
    return prepare(*source, options.processes, options.field, options.start, shard_bytes)
