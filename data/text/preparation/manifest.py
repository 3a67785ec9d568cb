"""Files of a prepared folder, and whether they are as they were written.

    manifest.json                      source and settings, counts, and digests of all that follows; written last
    prepared_text-{split}.array_record-00000-of-00003, ...
    {split}-documents.npy              (2, documents) int64: tokens and bytes of each document
    {split}-records.npy                (records,) int64: tokens of each record
    held_out-token_bytes.npy           (tokens,) uint32: bytes of text that each token stands for, if ids don't say it
    tokenizer.json                     unless tokens are bytes
    dataset_info.json, features.json   TFDS's own
    plan.json                          source and settings, written first
    parts/00000.json, 00000.npz        summary and lengths of each task, by which a lost shard can be made again

Easy to get wrong: the corpus digest is of tokens and names, not of files, so another version of the compression does
not make another corpus of the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import file_sha256, replace_text
from recollect.data.tokenizers import Tokenizer
from recollect.starting import PROGRAM

FORMAT = 2
SPLITS = ("train", "held_out")
ARRAYS, TOKEN_BYTES = ("documents", "records"), "token_bytes"
COUNTS = ("documents", "tokens", "bytes", "records", "unknown_bytes")
"""What is counted of each shard; "unknown_bytes" of text that the tokenizer does not know."""
MANIFEST, PLAN, TOKENIZER_FILE, PARTS = "manifest.json", "plan.json", "tokenizer.json", "parts"
LOCK = ".lock"
_KIND = "recollect prepared text"
_REMEDY = f"the `{PROGRAM} prepare` that made the folder repairs it"


def arrays_of(split: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the names of a split's arrays."""
    return ARRAYS if tokenizer.exact or split == "train" else (*ARRAYS, TOKEN_BYTES)


def task_file(folder: Path, number: int, suffix: str) -> Path:
    """Returns the path of the summary (".json") or the lengths (".npz") of a finished task."""
    return folder / PARTS / f"{number:05d}{suffix}"


def write_sealed(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes a whole JSON object with a digest of itself, and returns it."""
    sealed = {**content, "sha256": _seal(content)}
    replace_text(path, json.dumps(sealed, indent=1) + "\n")
    return sealed


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Returns what `write_sealed` wrote, without the digest; None where the file is missing or changed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content.pop("sha256") == _seal(content) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def read_summary(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the summary of a task whose files are all as they were written; None for others."""
    summary = read_sealed(task_file(folder, number, ".json"))
    if summary is None or not is_intact(task_file(folder, number, ".npz"), summary["lengths_sha256"]):
        return None
    shards = [summary[split] for split in SPLITS]
    return summary if all(is_intact(folder / shard["file"], shard["sha256"]) for shard in shards) else None


def is_intact(path: Path, digest: str) -> bool:
    """Returns whether a file is there and has the sha256 `digest`."""
    return os.path.exists(path) and file_sha256(path) == digest


def write_manifest(
    folder: Path,
    plan: dict[str, Any],
    tasks: list[dict[str, Any]],
    tokenizer: Tokenizer,
    name: str,
    files: dict[str, Any],
) -> dict[str, Any]:
    """Writes the manifest of a folder whose files are all there, and returns it.

    Args:
      folder: the prepared folder.
      plan: source and settings.
      tasks: summaries of all tasks, in order.
      tokenizer, name: of the ids, and what the user calls it.
      files: what was read and left out, JSON-ready (data/text/preparation/summary.py).
    """
    contents = [[task[split]["content"] for task in tasks] for split in SPLITS]
    splits = {}
    for split in SPLITS:
        shards = [task[split] for task in tasks]
        totals = {key: sum(shard[key] for shard in shards) for key in COUNTS}
        lengths = {array: file_sha256(folder / f"{split}-{array}.npy") for array in arrays_of(split, tokenizer)}
        splits[split] = {**totals, "shards": shards, "lengths": lengths}
    manifest = {
        "kind": _KIND,
        **plan,
        "digest": hashlib.sha256(json.dumps([FORMAT, tokenizer.digest, contents]).encode("utf-8")).hexdigest(),
        "tokenizer": {
            "name": name,
            "digest": tokenizer.digest,
            "vocabulary": tokenizer.vocabulary,
            "start": tokenizer.start,
            "start_token": tokenizer.start_token,
        },
        "files": files,
        "splits": splits,
    }
    return write_sealed(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a finished folder.

    Raises:
      UserError: the folder is unfinished or its manifest damaged.
    """
    if not os.path.exists(folder / MANIFEST):
        raise UserError(f"{folder}: its preparation was not finished; the same `{PROGRAM} prepare` continues it")
    manifest = read_sealed(folder / MANIFEST)
    if manifest is None or manifest["kind"] != _KIND:
        raise UserError(f"{folder / MANIFEST}: is not as it was written; {_REMEDY}")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder}: was prepared in format {manifest['format']}, and this version reads {FORMAT}; run "
            f"`{PROGRAM} prepare` again, into another folder"
        )
    return manifest


def is_prepared(folder: Path) -> bool:
    """Returns whether a folder is, or is becoming, prepared text."""
    return read_sealed(folder / PLAN) is not None


def check_files(folder: Path, manifest: dict[str, Any], *, contents: bool) -> None:
    """Compares files with the manifest: sizes of shards, digests of lengths and, with `contents`, of shards too.

    Raises:
      UserError: one is missing or differs; the message names it.
    """
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            same = os.path.exists(path) and path.stat().st_size == shard["size"]
            if not same or (contents and file_sha256(path) != shard["sha256"]):
                raise UserError(f"{path}: is missing or not as it was written; {_REMEDY}")
    for split, entry in manifest["splits"].items():
        for array, digest in entry["lengths"].items():
            if not is_intact(path := folder / f"{split}-{array}.npy", digest):
                raise UserError(f"{path}: is missing or not as it was written; {_REMEDY}")
