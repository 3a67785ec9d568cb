"""What lies in a prepared folder, and whether it is as it was written.

    manifest.json                      what it was made of, counts, and digests of all that follows; written last
    prepared_text-{split}.array_record-00000-of-00003, ...
    {split}-documents.npy              (2, documents) int64: tokens and bytes of each document
    {split}-records.npy                (records,) int64: tokens of each record
    tokenizer.json                     unless tokens are bytes
    dataset_info.json, features.json   TFDS's own
    plan.json                          what the folder is becoming: source and settings
    parts/00000.json, 00000.npz        facts and lengths of each task: with them a shard that is lost can be made again

Easy to get wrong: the corpus digest is of tokens and names, not of files, so that another version of the compression
does not make another corpus of the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.data.tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "held_out")
ARRAYS = ("documents", "records")
MANIFEST, PLAN, TOKENIZER_FILE, PARTS = "manifest.json", "plan.json", "tokenizer.json", "parts"
LOCK = ".lock"
TEMPORARY = ".writing-"
_KIND = "recollect prepared text"


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_file(folder: Path, number: int, suffix: str) -> Path:
    """Facts (".json") or lengths (".npz") of a task that is done."""
    return folder / PARTS / f"{number:05d}{suffix}"


def write_sealed(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes a JSON object with a digest of itself, by renaming; returns it."""
    sealed = {**content, "sha256": _seal(content)}
    own = path.with_name(TEMPORARY + path.name)
    with open(own, "w", encoding="utf-8") as file:
        file.write(json.dumps(sealed, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(own, path)
    return sealed


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None when that is not what is there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content.pop("sha256") == _seal(content) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a folder; None when it has none.

    Raises:
      UserError: it is damaged.
    """
    if not (folder / PLAN).exists():
        return None
    plan = read_sealed(folder / PLAN)
    if plan is None:
        raise UserError(f"{folder / PLAN}: is not as it was written; remove {folder} and prepare again")
    return plan


def read_facts(folder: Path, number: int) -> dict[str, Any] | None:
    """Facts of a task whose files are all as they were written; None of another."""
    facts = read_sealed(part_file(folder, number, ".json"))
    if facts is None:
        return None
    files = {folder / facts[split]["file"]: facts[split]["sha256"] for split in SPLITS}
    files[part_file(folder, number, ".npz")] = facts["lengths_sha256"]
    return facts if all(path.exists() and file_digest(path) == digest for path, digest in files.items()) else None


def write_manifest(
    folder: Path, plan: dict[str, Any], facts: list[dict[str, Any]], tokenizer: Tokenizer, name: str
) -> dict[str, Any]:
    """Writes the manifest of a folder whose files are all there; returns it."""
    contents = [[part[split]["content"] for part in facts] for split in SPLITS]
    digest = hashlib.sha256(json.dumps([FORMAT, tokenizer.digest, contents]).encode("utf-8")).hexdigest()
    splits = {
        split: {
            **{
                count: sum(part[split][count] for part in facts)
                for count in ("documents", "tokens", "bytes", "records")
            },
            "shards": [part[split] for part in facts],
            "lengths": {array: file_digest(folder / f"{split}-{array}.npy") for array in ARRAYS},
        }
        for split in SPLITS
    }
    described = {"name": name, "digest": tokenizer.digest, "vocabulary": tokenizer.vocabulary, "start": tokenizer.start}
    described["start_token"] = getattr(tokenizer, "start_token", None)
    manifest = {"kind": _KIND, **plan, "digest": digest, "tokenizer": described, "splits": splits}
    return write_sealed(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
      UserError: the folder is unfinished or its manifest damaged.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder}: its preparation was not finished; the same `python main.py prepare` goes on with it"
        )
    manifest = read_sealed(folder / MANIFEST)
    if manifest is None or manifest["kind"] != _KIND:
        raise UserError(f"{folder / MANIFEST}: is not as it was written; {_REMEDY}")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder}: has format {manifest['format']}, and this version reads {FORMAT}; prepare it again")
    return manifest


def is_prepared(folder: Path) -> bool:
    """Whether a folder is, or is becoming, prepared text."""
    plan = folder / PLAN
    return plan.is_file() and read_sealed(plan) is not None


def check_files(folder: Path, manifest: dict[str, Any], *, contents: bool) -> None:
    """Compares files with the manifest: sizes of shards and digests of lengths; with `contents` digests of shards too.

    Raises:
      UserError: one is missing or differs; it is named.
    """
    for split in SPLITS:
        for array in ARRAYS:
            path = folder / f"{split}-{array}.npy"
            if not path.exists() or file_digest(path) != manifest["splits"][split]["lengths"][array]:
                raise UserError(f"{path}: is missing or not as it was written; {_REMEDY}")
        for shard in manifest["splits"][split]["shards"]:
            path = folder / shard["file"]
            if (
                not path.exists()
                or path.stat().st_size != shard["size"]
                or (contents and file_digest(path) != shard["sha256"])
            ):
                raise UserError(f"{path}: is missing or not as it was written; {_REMEDY}")


_REMEDY = "the `python main.py prepare` that made the folder repairs it"
