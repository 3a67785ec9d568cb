"""Preparing text: tokens of a source, once, in a folder that training reads.

    python main.py prepare SOURCE OUT --tokenizer bpe:32768

The work is cut into tasks that depend on nothing but the source and the settings (data/text/preparation/sources.py);
processes do them in any order, and each leaves its shards and, last, its facts (data/text/preparation/shards.py).
Killed at any moment, the same command goes on with the tasks that lack facts, and the folder ends with the same bytes.
manifest.json is written last, and is what makes a folder a prepared one. The same command on a prepared folder checks
every byte, and makes again what is damaged.

Easy to get wrong: nothing in the folder may tell of time, host or number of processes, as reruns are compared byte for
byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.data.text.preparation.formats import read_unit
from recollect.data.text.preparation.manifest import (
    ARRAYS,
    FORMAT,
    LOCK,
    MANIFEST,
    PARTS,
    PLAN,
    SPLITS,
    TEMPORARY,
    TOKENIZER_FILE,
    part_file,
    read_facts,
    read_plan,
    read_sealed,
    write_manifest,
    write_sealed,
)
from recollect.data.text.preparation.shards import Job, PreparedText
from recollect.data.text.preparation.sources import Division, Source, open_source, rank
from recollect.data.text.preparation.worker_pool import Progress, work
from recollect.data.tokenizers import Tokenizer, bpe_size, open_tokenizer, tokenizer_file

BPE_BYTES = 1 << 30
"""A BPE is fitted to at most about this much text: all training documents, or a share of them chosen by their names."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A source and how it is to be prepared; `key` (sha256, hexadecimal) changes with whatever changes the bytes of
    the result."""

    source: Source
    tokenizer: str
    start: str | None
    plan: dict[str, Any]

    @property
    def key(self) -> str:
        return self.plan["key"]

    @classmethod
    def of(
        cls,
        source: str,
        tokenizer: str = "bytes",
        *,
        field: str = "text",
        start: str | None = None,
        shard_bytes: int | None = None,
    ) -> Preparation:
        """Looks at source and tokenizer.

        Args:
          source: see `recollect.data.text.preparation.sources.open_source`.
          tokenizer: "bytes", "bpe:SIZE" (trained on the training documents) or the path of a tokenizer.json.
          field: key, column or feature of the text.
          start: the token of a tokenizer.json that opens documents.
          shard_bytes: text of a shard, about; None: 4 MiB, more where that made over 512 shards.

        Raises:
          UserError: the source or the tokenizer won't do; the message says why.
        """
        size = bpe_size(tokenizer)
        if size and start is not None:
            raise UserError(f"start={start!r}: a BPE that is trained here has its own")
        known = tokenizer if size else open_tokenizer(tokenizer, start).digest
        opened = open_source(source, field, shard_bytes)
        plan = {
            "format": FORMAT,
            "fingerprint": opened.fingerprint,
            "tokenizer": known,
            "start": start,
            "field": field,
            "shard_bytes": shard_bytes,
        }
        plan["key"] = hashlib.sha256(json.dumps(plan).encode("utf-8")).hexdigest()
        return cls(opened, tokenizer, start, {"source": source, **plan})

    def into(self, out: Path, processes: int = 1, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Prepares into the folder `out`, or goes on where that was stopped; of a finished one, checks every byte.

        Args:
          out: a new or empty folder, or one that the same preparation left.
          processes: how many work at once; 1 works in this one.
          say: is told how it goes, a line at a time.

        Returns:
          The manifest.

        Raises:
          UserError: the source can't be read, or the folder can't be written or holds something else.
        """
        if processes < 1:
            raise UserError(f"processes={processes}: must be at least 1")
        if self.source.has(out):
            raise UserError(
                f"{out}: lies in the source {self.source.name}, and would be text of it; choose a folder outside"
            )
        with _claimed(out, self.plan, say) as plan:
            _sweep(out)
            name = "bytes" if self.tokenizer == "bytes" else str(out / TOKENIZER_FILE)
            if size := bpe_size(self.tokenizer):
                _fit_tokenizer(self.source.division, out, size, say)
            elif self.tokenizer != "bytes":
                _replace(out / TOKENIZER_FILE, tokenizer_file(self.tokenizer).read_bytes())
            own = open_tokenizer(name, self.start)
            division = self.source.division
            count = len(division.tasks)
            jobs = [
                Job(out, number, count, units, division.held_out_bound, name, self.start)
                for number, units in enumerate(division.tasks)
            ]
            return _finish(out, plan, _work(jobs, own.digest, processes, say), own, self.tokenizer, say)


def run(
    source: str,
    out: Path,
    tokenizer: str,
    processes: int | None,
    field: str,
    start: str | None,
    shard_bytes: int | None,
) -> int:
    """`python main.py prepare`: prepares and prints what came out; 0. The arguments are `Preparation`'s; processes
    None: one a core.

    Raises:
      UserError: it can't be done.
    """
    preparation = Preparation.of(source, tokenizer, field=field, start=start, shard_bytes=shard_bytes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    manifest = preparation.into(out, cores if processes is None else processes)
    for split, facts in manifest["splits"].items():
        print(
            f"{split}: {facts['tokens']:,} tokens, {facts['bytes']:,} bytes, {facts['documents']:,} documents, {len(facts['shards'])} shards"
        )
    print(
        f"tokenizer {manifest['tokenizer']['name']} of {manifest['tokenizer']['vocabulary']:,}; corpus sha256 {manifest['digest'][:16]}"
    )
    print(f"prepared: {out}; train with data.source={out}")
    return 0


@contextlib.contextmanager
def _claimed(out: Path, plan: dict[str, Any], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Holds the folder, which is new or holds what the same plan left, against other processes of this machine;
    gives its plan."""
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(out / LOCK, "w"))
        except OSError as error:
            raise UserError(
                f"cannot write to {out}: {error.strerror or error}; a cache can be elsewhere: set RECOLLECT_CACHE"
            ) from error
        _lock(lock, out, say)
        found = read_plan(out)
        others = [path.name for path in out.iterdir() if path.name != LOCK and not path.name.startswith(TEMPORARY)]
        if found is None and others:
            raise UserError(f"{out}: holds {sorted(others)[0]} and is no prepared text; choose a new or empty folder")
        if found is not None and found["key"] != plan["key"]:
            differing = ", ".join(
                f"{field} {found[field]!r}" for field in plan if field != "key" and found[field] != plan[field]
            )
            raise UserError(
                f"{out}: was prepared from something else ({differing}); choose another folder, or remove this one"
            )
        try:
            if found is None:
                found = write_sealed(out / PLAN, plan)
            (out / PARTS).mkdir(exist_ok=True)
            yield {field: found[field] for field in plan}
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error.strerror or error}); the same command goes on from here"
            ) from error


def _lock(file: Any, out: Path, say: Callable[[str], None]) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another process is preparing {out}; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        # A file system without locks. Two at once would do the work twice, with the same result.
        say(f"{out}: this file system has no locks; see that nobody else prepares it")


def _sweep(out: Path) -> None:
    """Removes what killed processes were writing."""
    for path in [*out.glob(f"{TEMPORARY}*"), *(out / PARTS).glob(f"{TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fit_tokenizer(division: Division, out: Path, size: int, say: Callable[[str], None]) -> None:
    """Fits a BPE to the training documents, unless it is there, and is the one with which tasks were done."""
    from recollect.data.tokenizers.huggingface import train_bpe

    if (out / TOKENIZER_FILE).exists():
        used = {facts["tokenizer"] for path in (out / PARTS).glob("*.json") if (facts := read_sealed(path))}
        with contextlib.suppress(UserError):
            if used <= {open_tokenizer(str(out / TOKENIZER_FILE)).digest}:
                return
    share = min(BPE_BYTES / division.size, 1.0)

    def texts() -> Iterator[str]:
        for unit in (unit for task in division.tasks for unit in task):
            for document in read_unit(unit):
                if division.split_of(unit, document.name) == "train" and rank(f"{document.name} {unit.begin}") <= share:
                    yield from (stretch.decode("utf-8") for stretch in document.stretches)

    say(f"fitting a BPE of {size:,} to {min(division.size, BPE_BYTES) / 1e6:,.0f} MB of text")
    _replace(out / TOKENIZER_FILE, train_bpe(texts(), size).encode("utf-8"))


def _work(jobs: list[Job], digest: str, processes: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Facts of all tasks in order, doing those that lack them."""
    facts = {}
    for job in jobs:
        found = read_facts(job.folder, job.number)
        if found is not None and found["tokenizer"] == digest:
            facts[job.number] = found
    missing = [job for job in jobs if job.number not in facts]
    if not missing:
        say(f"{jobs[0].folder}: all {len(jobs)} tasks are done, and their files as they were written")
        return [facts[job.number] for job in jobs]
    out = jobs[0].folder
    (out / MANIFEST).unlink(missing_ok=True)
    if facts:
        say(f"{len(facts)} of {len(jobs)} tasks are done already")
    progress = Progress(len(jobs), missing, say)
    try:
        for found in work(missing, min(processes, len(missing))):
            facts[found["number"]] = found
            progress.add(found)
    finally:
        progress.close()
    return [facts[job.number] for job in jobs]


def _finish(
    out: Path,
    plan: dict[str, Any],
    facts: list[dict[str, Any]],
    tokenizer: Tokenizer,
    name: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Joins what the tasks left: lengths, TFDS's metadata and, last, the manifest; again when they are there
    already."""
    for split in SPLITS:
        if not sum(part[split]["documents"] for part in facts):
            raise UserError(f"source={plan['source']!r}: has no text for the {split} split")
    if name.startswith("bpe:") and tokenizer.vocabulary < int(name.removeprefix("bpe:")):
        say(f"the text has pairs for {tokenizer.vocabulary:,} tokens only")
    _join_lengths(out, len(facts))
    tfds.disable_progress_bar()
    PreparedText(tokenizer.vocabulary, data_dir=out).write_metadata(
        out,
        {split: [part[split]["records"] for part in facts] for split in SPLITS},
        {split: sum(part[split]["size"] for part in facts) for split in SPLITS},
    )
    return write_manifest(out, plan, facts, tokenizer, name)


def _join_lengths(out: Path, tasks: int) -> None:
    """{split}-documents.npy, (2, documents) tokens and bytes of each, and {split}-records.npy, tokens of each
    record."""
    parts = []
    for number in range(tasks):
        with np.load(part_file(out, number, ".npz")) as part:
            parts.append({key: part[key] for key in part.files})
    for split in SPLITS:
        table = np.concatenate([part[f"{split}_documents"] for part in parts])
        first = np.flatnonzero(table[:, 2] == 0)
        lengths = np.add.reduceat(table[:, :2], first, axis=0).T if len(first) else np.zeros((2, 0), np.int64)
        records = np.concatenate([part[f"{split}_records"] for part in parts])
        for name, array in zip(ARRAYS, (lengths, records), strict=True):
            file = io.BytesIO()
            np.save(file, array)
            _replace(out / f"{split}-{name}.npy", file.getvalue())


def _replace(path: Path, content: bytes) -> None:
    own = path.with_name(TEMPORARY + path.name)
    own.write_bytes(content)
    os.replace(own, path)
