"""Preparation of text: the tokens of a source, made once, in a folder that training reads.

    python main.py prepare SOURCE OUT --tokenizer bpe:32768

The work is divided into tasks that depend on the source and the settings alone (data/text/preparation/sources.py);
processes do them in any order, and each leaves its shards and, last, its summary (data/text/preparation/shards.py).
Killed at any moment, the same command continues with the tasks that have no summary, and the folder ends with the same
bytes. manifest.json is written last and marks the folder as prepared. The same command on a prepared folder checks
every byte, and makes again what is damaged.

Easy to get wrong: nothing in the folder may depend on time, host or number of processes, as reruns are compared byte
for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.configuration.console import NOW, doing
from recollect.configuration.disk_full import is_disk_full
from recollect.configuration.io import first_line, replace_text, replacing
from recollect.configuration.machine import expanded
from recollect.data.text.preparation.claimed_folder import Log, claim, locked, remove_unfinished
from recollect.data.text.preparation.documents import read_documents
from recollect.data.text.preparation.listing import Selection
from recollect.data.text.preparation.manifest import (
    FORMAT,
    MANIFEST,
    PARTS,
    SPLITS,
    TOKENIZER_FILE,
    arrays_of,
    read_sealed,
    read_summary,
    task_file,
    write_manifest,
)
from recollect.data.text.preparation.shards import ShardTask, write_tfds_metadata
from recollect.data.text.preparation.sources import Division, open_source, rank, split_of
from recollect.data.text.preparation.summary import described, files_entry, summary_lines
from recollect.data.text.preparation.worker_pool import run_tasks
from recollect.data.tokenizers import Tokenizer, bpe_size, open_tokenizer, tokenizer_file

UNKNOWN_SHARE = 0.01
"""The largest share of a text that a tokenizer need not know, unless more is allowed."""
BPE_BYTES = 1 << 30
"""A BPE is fitted to at most about this much text: all training documents, or a share of them chosen by their names."""


class Preparation:
    """A source and the settings of its preparation.

    Attributes:
      source: the opened source.
      plan: source and settings, JSON-ready.
      key: sha256, hexadecimal, which changes with whatever changes the bytes of the result.

    Args:
      source: see `recollect.data.text.preparation.sources.open_source`.
      tokenizer: "bytes", "bpe:SIZE" (trained on the training documents) or the path of a tokenizer.json.
      field: key, column or feature of the text.
      start: the token of a tokenizer.json that opens documents.
      shard_bytes: text per shard, about; None: 4 MiB, more where that made over 512 shards.
      selection: what of the source is read, and what is held out.
      strict: stop where text is left out.
      unknown: the largest share of the text that the tokenizer need not know.

    Raises:
      UserError: the source or the tokenizer can't be used; the message says why.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str = "bytes",
        *,
        field: str = "text",
        start: str | None = None,
        shard_bytes: int | None = None,
        selection: Selection = Selection(),
        strict: bool = False,
        unknown: float = UNKNOWN_SHARE,
    ):
        self.tokenizer, self.start, self._bpe_size = tokenizer, start, bpe_size(tokenizer)
        if self._bpe_size and start is not None:
            raise UserError(f"start={start!r}: a BPE that is trained here has its own")
        if not 0 <= unknown <= 1:
            raise UserError(f"unknown={unknown}: must be a share of the text, from 0 to 1")
        self._strict, self._unknown = strict, unknown
        digest = tokenizer if self._bpe_size else open_tokenizer(tokenizer, start).digest
        self.source = open_source(source, field, shard_bytes, selection)
        settings = {
            "format": FORMAT,
            "fingerprint": self.source.fingerprint,
            "tokenizer": digest,
            "start": start,
            "field": field,
            "shard_bytes": shard_bytes,
            "encoding": selection.encoding,
            "held_out": selection.share,
        }
        self.key = hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()
        self.plan = {"source": source, **settings, "key": self.key}

    def into(self, out: Path, processes: int = 1, log: Log = print) -> dict[str, Any]:
        """Prepares into the folder `out`, or continues where that was stopped; of a finished one, checks every byte.

        Args:
          out: a new or empty folder, or one that the same preparation left.
          processes: how many work at once; 1 works in this one.
          log: receives progress, a line at a time.

        Returns:
          The manifest.

        Raises:
          UserError: the source can't be read, or the folder can't be written or holds something else.
        """
        if processes < 1:
            raise UserError(f"processes={processes}: must be at least 1")
        out = expanded(out, f"out={str(out)!r}")
        if self.source.has(out):
            raise UserError(
                f"{out}: lies in the source {self.source.name}, and would be text of it; choose a folder outside"
            )
        left_out = self.source.division.left_out  # looks at the whole source, before anything is written
        if self._strict and (lost := [one for one in left_out if one.lost]):
            raise UserError(f"source={self.source.name!r}: --strict stops, as text may be left out: {described(lost)}")
        with locked(out, log):
            try:
                return self._prepare(out, claim(out, self.plan), processes, log)
            except Exception as error:  # array_record has types of its own for a full disk
                if not isinstance(error, OSError) and not is_disk_full(error):
                    raise
                raise UserError(
                    f"{out}: cannot be written ({first_line(error)}); the same command continues from here"
                ) from error

    def _prepare(self, out: Path, plan: dict[str, Any], processes: int, log: Log) -> dict[str, Any]:
        (out / PARTS).mkdir(exist_ok=True)
        remove_unfinished(out)
        division = self.source.division
        name = "bytes" if self.tokenizer == "bytes" else str(out / TOKENIZER_FILE)
        if self._bpe_size:
            _fit_tokenizer(division, out, self._bpe_size, log)
        elif name != "bytes":
            with replacing(out / TOKENIZER_FILE) as path:
                shutil.copyfile(tokenizer_file(self.tokenizer), path)
        tokenizer = open_tokenizer(name, self.start)
        if self._bpe_size and tokenizer.vocabulary < self._bpe_size:
            log(f"the text has pairs for {tokenizer.vocabulary:,} tokens only")
        count = len(division.tasks)
        tasks = [
            ShardTask(out, number, count, parts, division.held_out_bound, name, self.start)
            for number, parts in enumerate(division.tasks)
        ]
        summaries = _do(tasks, tokenizer.digest, processes, log)
        for split in SPLITS:
            if not any(summary[split]["documents"] for summary in summaries):
                raise UserError(f"source={plan['source']!r}: has no text for the {split} split")
        self._check_unknown(summaries)
        _join_lengths(out, count, tokenizer)
        tfds.disable_progress_bar()
        write_tfds_metadata(out, tokenizer.vocabulary, summaries)
        files = files_entry(division.read, division.left_out, summaries)
        manifest = write_manifest(out, plan, summaries, tokenizer, self.tokenizer, files)
        for line in summary_lines(manifest):
            log(line)
        return manifest

    def _check_unknown(self, summaries: list[dict[str, Any]]) -> None:
        """Raises UserError where the tokenizer does not know more of a split than was allowed."""
        for split in SPLITS:
            unknown, size = (sum(summary[split][key] for summary in summaries) for key in ("unknown_bytes", "bytes"))
            if unknown > self._unknown * size:
                allowed = min(unknown / size + 0.01, 1)
                raise UserError(
                    f"tokenizer={self.tokenizer!r}: does not know {unknown / size:.3%} of the {split} text ({unknown:,}"
                    f" of {size:,} bytes); take another, or allow it with --unknown {allowed:.2f}"
                )


def _fit_tokenizer(division: Division, out: Path, size: int, log: Log) -> None:
    """Fits a BPE to the training documents, unless it is there and is the one with which tasks were done."""
    from recollect.data.tokenizers.huggingface import train_bpe

    if (out / TOKENIZER_FILE).exists():
        used = {summary["tokenizer"] for path in (out / PARTS).glob("*.json") if (summary := read_sealed(path))}
        with contextlib.suppress(UserError):
            if used <= {open_tokenizer(str(out / TOKENIZER_FILE)).digest}:
                return
    share = min(BPE_BYTES / division.size, 1.0)

    def texts() -> Iterator[str]:
        for part in (part for parts in division.tasks for part in parts):
            for name, chunks in read_documents(part):
                train = split_of(part, name, division.held_out_bound) == "train"
                if train and rank(f"{name} {part.begin}") <= share:
                    yield from (chunk.decode("utf-8") for chunk in chunks)

    text = min(division.size, BPE_BYTES)
    amount = f"{text / 1e6:,.0f} MB" if text >= 1e6 else f"{text:,} bytes"
    log(f"fitting a BPE of {size:,} to {amount} of text")
    replace_text(out / TOKENIZER_FILE, train_bpe(texts(), size))


def _do(tasks: list[ShardTask], digest: str, processes: int, log: Log) -> list[dict[str, Any]]:
    """Returns the summaries of all tasks in order, doing those that have none by the tokenizer with this digest."""
    out, count = tasks[0].folder, len(tasks)
    summaries = {}
    for task in tasks:
        summary = read_summary(out, task.number)
        if summary is not None and summary["tokenizer"] == digest:
            summaries[task.number] = summary
    missing = [task for task in tasks if task.number not in summaries]
    if not missing:
        log(f"{out}: all {count} tasks are done, and their files as they were written")
        return [summaries[task.number] for task in tasks]
    (out / MANIFEST).unlink(missing_ok=True)
    if len(missing) < count:
        log(f"{count - len(missing)} of {count} tasks are done already")
    total = sum(task.size for task in missing)
    begun, size, tokens = time.monotonic(), 0, 0

    def speed() -> str:
        return f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens per second"

    def show() -> None:
        shards = f"{len(missing)} shard{'s' if len(missing) > 1 else ''}"
        doing(f"{size:,} of {total:,} bytes of {shards}", (size, total, speed))

    show()
    for summary in run_tasks(missing, min(processes, len(missing))):
        summaries[summary["number"]] = summary
        size += summary["source_bytes"]
        tokens += sum(summary[split]["tokens"] for split in SPLITS)
        show()
    NOW.job = None
    log(f"{tokens:,} tokens in {time.monotonic() - begun:,.1f} s: {speed()}")
    return [summaries[task.number] for task in tasks]


def _join_lengths(out: Path, count: int, tokenizer: Tokenizer) -> None:
    """Writes {split}-documents.npy and the other arrays of each split from the lengths of all tasks."""
    tasks = [dict(np.load(task_file(out, number, ".npz"))) for number in range(count)]
    for split in SPLITS:
        table = np.concatenate([task[f"{split}_documents"] for task in tasks])
        # Rows of a document that tasks share follow one another; all but its first are marked.
        lengths = np.add.reduceat(table[:, :2], np.flatnonzero(table[:, 2] == 0), axis=0).T
        for name in arrays_of(split, tokenizer):
            array = lengths if name == "documents" else np.concatenate([task[f"{split}_{name}"] for task in tasks])
            with replacing(out / f"{split}-{name}.npy") as path:
                np.save(path, array)
