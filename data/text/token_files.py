"""Files of token ids, made elsewhere: NumPy's .npy, and raw .bin as nanoGPT's data scripts write them.

    data.source=train.bin                    # or a folder that holds train.bin or train.npy, with val.bin beside it
    data.token_type=uint32 data.end_token=50256 data.tokenizer=tokenizer.json      # what such files do not say

The files stay where they are and are read through memory maps. Names say the splits (val, validation, dev, test); where
no file is named so, the last twentieth of the last file is held out. Each file is read through once, for its digest,
its largest id and where `end_token` stands; the cache folder keeps that until the file changes. A pickle (meta.pkl) is
never opened, as that could run code.

With `end_token` a file is one document after another: each ends with it, as a target like any other, and opens with the
one before. Without, a file is one document. How many bytes of text ids stand for is known only where a tokenizer says
it; otherwise losses are reported per token, and `held_out_bytes` counts tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from recollect.configuration import UserError
from recollect.configuration.io import file_sha256, first_line, write_json
from recollect.configuration.machine import cache_folder, expanded
from recollect.configuration.user_paths import path_kind
from recollect.data.text.preparation.splits import split_by_name
from recollect.data.tokenizers import ByteTokenizer, Tokenizer, open_tokenizer

SUFFIXES = (".npy", ".bin")
HELD_OUT_SHARE = 0.05
_CHUNK = 1 << 24
"""Ids that are looked at together."""


class IdTokenizer(Tokenizer):
    """Stands for the tokenizer of ids whose text is not known: it shows the ids themselves."""

    name = "ids"

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.digest = hashlib.sha256(f"ids below {vocabulary}".encode()).hexdigest()
        self.start = 0

    def ids(self, text: bytes) -> Int[np.ndarray, " n"]:
        raise UserError(
            "the data are token ids without a tokenizer, so text has none; data.tokenizer=FILE names theirs"
        )

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the ids in decimal, blanks between."""
        return " ".join(str(int(number)) for number in ids).encode()

    def decode_document(self, ids: Iterable[int]) -> str:
        return self.decode(ids)


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of ids: a memory map, its digest, the largest id, and the places of the token that ends documents."""

    path: Path
    ids: np.ndarray
    digest: str
    largest: int
    ends: Int[np.ndarray, " documents"]


class MappedDocuments:
    """Documents of one split, read from memory maps; see `recollect.data.text.preparation.reader.TokenDocuments`.

    Attributes:
      lengths: tokens of each document, the opening and the ending one included.
      byte_lengths: bytes of each, or targets where bytes are not known; of held-out documents only.
      unknown_bytes: 0.

    Args:
      parts: files, with the first id and the end of what belongs to this split.
      token_bytes: bytes that each id stands for; None where that is not known.
    """

    unknown_bytes = 0

    def __init__(self, parts: list[tuple[TokenFile, int, int]], token_bytes: np.ndarray | None, *, measured: bool):
        self._files = [file for file, _, _ in parts]
        self._token_bytes = token_bytes
        where = [_documents(file, begin, end) + (number,) for number, (file, begin, end) in enumerate(parts)]
        self._begin, self._end = (np.concatenate([row[side] for row in where]) for side in (0, 1))
        self._file = np.concatenate([np.full(len(row[0]), row[2], np.int32) for row in where])
        self.lengths: Int[np.ndarray, " documents"] = self._end - self._begin
        self.byte_lengths = self.lengths - 1
        if measured and token_bytes is not None:
            sizes = [int(self.token_bytes(number, 0, int(length)).sum()) for number, length in enumerate(self.lengths)]
            self.byte_lengths = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ids(self) -> int:
        """Ids of the split, each counted once, though the end of one document may open the next."""
        shared = (self._begin[1:] < self._end[:-1]) & (self._file[1:] == self._file[:-1])
        return int(self.lengths.sum()) - int(shared.sum())

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " n"]:
        """Returns tokens `start` to `stop` (None: the end) of a document; fewer where it ends before."""
        begin, end = int(self._begin[document]), int(self._end[document])
        stop = end if stop is None else min(begin + stop, end)
        return np.asarray(self._files[self._file[document]].ids[begin + start : stop], np.int32)

    def token_bytes(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns how many bytes of text tokens `start` to `stop` of a document stand for, or 1 each where that is not
        known; 0 for the opening one."""
        tokens = self.tokens(document, start, stop)
        sizes = (
            np.ones(len(tokens), np.int64) if self._token_bytes is None else self._token_bytes[tokens].astype(np.int64)
        )
        if start == 0 and len(sizes):
            sizes[0] = 0
        return sizes


def _documents(file: TokenFile, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the documents between two places of a file begin and end; those without a target are left out."""
    inside = file.ends[(file.ends >= begin) & (file.ends < end - 1)]
    begins, ends = np.concatenate([[begin], inside]), np.concatenate([inside + 1, [end]])
    kept = ends - begins > 1
    return begins[kept], ends[kept]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Token files as `recollect.data.text.preparation.reader.Prepared` is prepared text.

    Attributes:
      counts_bytes: whether losses can be reported per byte; else per token.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    train: MappedDocuments
    held_out: MappedDocuments
    counts_bytes: bool

    def describe(self) -> dict[str, Any]:
        """Returns what a run's banner and result say of the corpus, JSON-ready."""
        sizes: dict[str, dict[str, int]] = {
            name: {"documents": len(part), "tokens": part.ids}
            for name, part in (("train", self.train), ("held_out", self.held_out))
        }
        if self.counts_bytes:
            sizes["held_out"]["bytes"] = int(self.held_out.byte_lengths.sum())
        return {"source": self.name, "digest": self.digest, "tokenizer": self.tokenizer.name, **sizes}


def are_token_files(source: str) -> bool:
    """Returns whether a source is a .npy or .bin file (there or not), or a folder that holds one named train."""
    if source == "stdlib" or source.startswith("tfds:"):
        return False
    path = expanded(source, f"source={source!r}")
    is_folder = path_kind(path, f"source={source!r}") == "folder"
    if path.suffix in SUFFIXES:
        return not is_folder
    return is_folder and any(split_by_name(file.name) == "train" for file in _in_folder(path))


def _in_folder(path: Path) -> list[Path]:
    try:
        return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    except OSError as error:
        raise UserError(f"source={str(path)!r}: the folder cannot be read ({error.strerror})") from error


def _files_of(source: str) -> tuple[list[Path], list[Path]]:
    """Returns the files to train on, and those held out by their names, in a folder or beside one named train."""
    path = expanded(source, f"source={source!r}")
    folder = path if path.is_dir() else path.parent
    splits: dict[str, list[Path]] = {}
    for file in _in_folder(folder) if folder.is_dir() else []:
        if path.is_dir() or file.suffix == path.suffix:
            splits.setdefault(split_by_name(file.name) or "", []).append(file)
    held_out = splits.get("validation") or splits.get("test") or []
    if path.is_dir():
        return splits["train"], held_out
    return [path], held_out if split_by_name(path.name) == "train" else []


def open_token_files(
    source: str, dtype: str, end_token: int | None, vocabulary: int | None, tokenizer: str | None, start: str | None
) -> TokenCorpus:
    """Returns the documents of token files.

    Args:
      source: see `are_token_files`.
      dtype: of .bin files, "uint16" or "uint32".
      end_token: the id that ends a document; None: files are documents.
      vocabulary: number of ids; None: the tokenizer's, else the largest id and one.
      tokenizer, start: of the ids, as arguments of `open_tokenizer`; None where it is not known.

    Raises:
      UserError: no such file, one that holds no ids, or other ids than were named.
    """
    train, held_out = ([_open(file, dtype, end_token) for file in files] for files in _files_of(source))
    opened = None if tokenizer is None else open_tokenizer(tokenizer, start)
    limits = {} if vocabulary is None else {f"data.vocabulary_size={vocabulary}": vocabulary}
    if opened is not None:
        limits[f"data.tokenizer={tokenizer!r} has {opened.vocabulary} ids"] = opened.vocabulary
    for file in (*train, *held_out):
        for limit, size in limits.items():
            if file.largest >= size:
                raise UserError(
                    f"{limit}: {file.path} holds the id {file.largest}; the vocabulary must be larger than that"
                )
        if isinstance(opened, ByteTokenizer):
            _check_bytes(file.path, file.ids)
    if end_token is not None and not any(len(file.ends) for file in train):
        raise UserError(f"data.end_token={end_token}: is nowhere in {train[0].path}; leave it out to read one document")
    known = opened is not None and opened.exact
    token_bytes = opened.token_bytes if opened is not None and known else None
    parts = [(file, 0, len(file.ids)) for file in train]
    held_parts = [(file, 0, len(file.ids)) for file in held_out]
    if not held_parts:
        last, _, end = parts[-1]
        cut = int(end * (1 - HELD_OUT_SHARE))
        parts[-1], held_parts = (last, 0, cut), [(last, cut, end)]
    facts = [[(file.digest, *span) for file, *span in some] for some in (parts, held_parts)]
    digest = hashlib.sha256(json.dumps([facts, end_token, opened and opened.digest]).encode()).hexdigest()
    splits_of = (
        MappedDocuments(parts, token_bytes, measured=False),
        MappedDocuments(held_parts, token_bytes, measured=True),
    )
    for split, documents in zip(("to train on", "held out"), splits_of, strict=True):
        if not len(documents):
            raise UserError(f"source={source!r}: has too few ids {split}; a document needs two")
    ids = opened or IdTokenizer(vocabulary or 1 + max(file.largest for file in (*train, *held_out)))
    return TokenCorpus(source, digest, ids, *splits_of, counts_bytes=known)


def _open(path: Path, dtype: str, end_token: int | None) -> TokenFile:
    """Returns a file of ids, which is read through unless its facts are in the cache folder."""
    ids = _mapped(path, dtype)
    state = path.stat()
    key = json.dumps([str(path.resolve()), state.st_size, state.st_mtime_ns, str(ids.dtype), end_token])
    folder = cache_folder() / "token_files" / hashlib.sha256(key.encode()).hexdigest()[:20]
    facts, places = folder / "facts.json", folder / "ends.npy"
    if not facts.exists():
        from recollect.data.text.preparation.claimed_folder import locked

        with locked(folder, lambda line: print(line, file=sys.stderr)):
            if not facts.exists():  # another process may have written them meanwhile
                largest, ends = _read_through(path, ids, end_token)
                np.save(places, ends)
                write_json(facts, {"sha256": file_sha256(path), "largest": largest})
    known = json.loads(facts.read_text())
    return TokenFile(path, ids, known["sha256"], known["largest"], np.load(places))


def _read_through(path: Path, ids: np.ndarray, end_token: int | None) -> tuple[int, Int[np.ndarray, " documents"]]:
    """Returns the largest id of a file, and the places of the one that ends documents."""
    largest, ends = 0, [np.zeros(0, np.int64)]
    for begin in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[begin : begin + _CHUNK])
        if chunk.min() < 0:
            raise UserError(f"{path}: holds the id {chunk.min()}; ids of tokens are not negative")
        largest = max(largest, int(chunk.max()))
        if end_token is not None:
            ends.append(begin + np.flatnonzero(chunk == end_token))
    if largest >= 2**31 - 1:
        raise UserError(f"{path}: holds the id {largest}, and ids must be below {2**31 - 1}; is it another type?")
    return largest, np.concatenate(ends)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """Returns the memory map of a file's ids."""
    if not path.is_file():
        raise UserError(f"source={str(path)!r}: no such file; .npy and .bin are files of token ids")
    size = os.path.getsize(path)
    if path.suffix == ".npy":
        try:
            ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path}: is not an array that can be read without running code ({first_line(error)})"
            ) from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            problem = f"is {ids.dtype} of shape {ids.shape}"
            raise UserError(f"{path}: {problem}; token ids are a vector of integers, for example array.reshape(-1)")
    else:
        width = np.dtype(dtype).itemsize
        if size % width:
            raise UserError(f"{path}: {size:,} bytes are not whole ids of {dtype}; data.token_type names another type")
        ids = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
        _check_width(path, ids)
    if len(ids) < 2:
        raise UserError(f"{path}: holds {len(ids)} ids; at least two are needed")
    return ids


def _check_width(path: Path, ids: np.ndarray) -> None:
    """Raises UserError where ids read in 16 bits look like the halves of wider ones, every second one being small; or
    ids read in 32 bits like pairs of narrower ones, whose upper halves reach as far as the lower."""
    first = np.asarray(ids[: 1 << 16])
    if len(first) < 64:
        return
    if ids.dtype == np.uint16 and len(first) % 2 == 0:
        halves = first.reshape(-1, 2)
        if np.all(halves[:, 1] <= 16) and np.any(halves[:, 0] > 16):
            raise UserError(
                f"{path}: looks like ids of 32 bits read as 16, every second one is at most 16; data.token_type=uint32"
            )
    elif ids.dtype == np.uint32:
        low, high = int((first & 0xFFFF).max()), int((first >> 16).max())
        if high and 2 * high > low:
            raise UserError(
                f"{path}: looks like ids of 16 bits read as 32, two at a time (one is {first.max():,}); "
                "data.token_type=uint16"
            )


def _check_bytes(path: Path, ids: np.ndarray) -> None:
    """Raises UserError where ids, read as bytes of text, are largely control characters."""
    first = np.asarray(ids[: 1 << 16])
    control = float(np.mean((first < 32) & ~np.isin(first, [9, 10, 13])))
    if control > 0.05:
        raise UserError(
            f"data.tokenizer='bytes': {path} holds token ids of another tokenizer, as bytes {control:.0%} would be "
            "control characters; name theirs, or leave data.tokenizer out"
        )
