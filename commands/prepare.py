"""Tokenises a text source once, into a folder that training reads."""

from __future__ import annotations

import argparse
import math

from recollect.configuration.user_paths import path
from recollect.starting import PROGRAM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    text = "stdlib, tfds:NAME, a file or a folder of text, JSON (lines), parquet or Arrow; .gz, .zst, .bz2, .xz too"
    parser.add_argument("source", help=text)
    parser.add_argument("out", type=path, help="a new folder, or one that the same command left unfinished")
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
    parser.add_argument(
        "--held-out",
        metavar="SHARE_OR_PATH",
        help="a share of the documents, a split's name, or files (default: the validation split, else the test split, "
        "else 0.05)",
    )
    text = "files to read that have to be asked for, such as '*.csv' or '*.py'"
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="files to leave out")
    parser.add_argument("--encoding", metavar="NAME", help="of text files that are not UTF-8 (default: left out)")
    parser.add_argument("--config", metavar="NAME", help="a configuration of the card of a Hugging Face data set")
    parser.add_argument("--strict", action="store_true", help="stop where text would be left out")
    text = "largest share of the text that the tokenizer need not know (default: 0.01)"
    parser.add_argument("--unknown", type=float, metavar="SHARE", help=text)
    parser.add_argument("--processes", type=int, metavar="N", help="how many work at once (default: one per core)")
    parser.add_argument("--shard-mib", type=float, metavar="N", help="text of a shard (default: 4, more from 2 GiB on)")


def run(options: argparse.Namespace) -> int:
    """Runs the command: prepares, prints what was read, left out and counted; returns its exit code."""
    from recollect.configuration import UserError
    from recollect.configuration.machine import cpu_count
    from recollect.data.text.preparation.listing import Selection
    from recollect.data.text.preparation.prepare import UNKNOWN_SHARE, Preparation
    from recollect.data.text.token_files import are_token_files

    if options.out.is_file():
        raise UserError(f"{options.out} is a file; `{PROGRAM} prepare SOURCE OUT` writes the folder OUT")
    if are_token_files(options.source):
        raise UserError(f"{options.source}: token ids need no preparation; train with data.source={options.source}")
    mib = options.shard_mib
    if mib is not None and not (math.isfinite(mib) and mib > 0):
        raise UserError(f"--shard-mib {mib}: must be a positive number of MiB")
    preparation = Preparation(
        options.source,
        options.tokenizer,
        field=options.field,
        start=options.start,
        shard_bytes=None if mib is None else max(int(mib * 2**20), 1),
        selection=Selection(
            include=tuple(options.include),
            exclude=tuple(options.exclude),
            encoding=options.encoding,
            held_out=options.held_out,
            config=options.config,
        ),
        strict=options.strict,
        unknown=UNKNOWN_SHARE if options.unknown is None else options.unknown,
    )
    manifest = preparation.into(options.out, cpu_count() if options.processes is None else options.processes)
    for split, counts in manifest["splits"].items():
        print(
            f"{split}: {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, {counts['documents']:,} documents, "
            f"{len(counts['shards'])} shard{'s' if len(counts['shards']) != 1 else ''}"
        )
    tokenizer = manifest["tokenizer"]
    print(
        f"tokenizer {tokenizer['name']} of {tokenizer['vocabulary']:,}; corpus sha256 {manifest['digest'][:16]}\n"
        f"prepared: {options.out}; train with data.source={options.out}"
    )
    return 0
