"""Prepared text: documents as tokens, with their lengths, any range of which can be read.

    prepared = open_prepared("stdlib")               # or a folder made by `python main.py prepare`, a path, "tfds:NAME"
    prepared.train.lengths[0]                        # tokens of the first document, the opening one included
    prepared.train.tokens(0, 0, 512)                 # its first 512 tokens at most

What is not a prepared folder is prepared into the cache folder on first use, in this process: `python main.py prepare`
does the same in several, with a tokenizer of its own.

Easy to get wrong: a split is one stream of tokens, cut into records; a document of over 65,536 tokens lies in several,
and any document of a text file that is divided among tasks may.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.configuration.machine import cache_folder, expanded
from recollect.data.text.preparation.manifest import (
    MANIFEST,
    TOKEN_BYTES,
    TOKENIZER_FILE,
    arrays_of,
    check_files,
    is_prepared,
    read_manifest,
)
from recollect.data.text.preparation.prepare import Preparation
from recollect.data.tokenizers import Tokenizer, open_tokenizer
from recollect.starting import PROGRAM

KEPT_BYTES = 1 << 28
CHECKED_BYTES = 1 << 28
"""Shards of up to this many bytes in all are compared with their digests whenever they are opened; larger ones by
size."""


class TokenDocuments:
    """Documents of one split as tokens, read when asked for; the first `KEPT_BYTES` of them stay in memory.

    Attributes:
      lengths: tokens of each document, the opening one included.
      byte_lengths: bytes of text of each document.
      unknown_bytes: bytes of text that the tokenizer does not know.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, unknown_bytes: int):
        self.unknown_bytes = unknown_bytes
        self.lengths: Int[np.ndarray, " documents"]
        self.byte_lengths: Int[np.ndarray, " documents"]
        self.lengths, self.byte_lengths = np.load(folder / f"{split}-documents.npy")
        self._begin = np.concatenate([[0], np.cumsum(self.lengths)])
        self._record_begin = np.concatenate([[0], np.cumsum(np.load(folder / f"{split}-records.npy"))])
        sizes = folder / f"{split}-{TOKEN_BYTES}.npy"
        self._token_bytes = np.load(sizes, mmap_mode="r") if TOKEN_BYTES in arrays_of(split, tokenizer) else None
        self._source = tfds.builder_from_directory(folder).as_data_source(split=split)
        self._folder = folder
        self._tokenizer = tokenizer
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " n"]:
        """Returns tokens `start` to `stop` (None: the end) of a document; fewer where it ends before.

        Raises:
          IndexError: no such document.
          UserError: the records can't be read.
        """
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        if not 0 <= start < stop:
            return np.zeros(0, np.int32)
        begin, end = int(self._begin[document]) + start, int(self._begin[document]) + stop
        first = int(np.searchsorted(self._record_begin, begin, side="right")) - 1
        offsets = self._record_begin[first : np.searchsorted(self._record_begin, end, side="left")].tolist()
        parts = [self._record(first + n)[max(begin - at, 0) : end - at] for n, at in enumerate(offsets)]
        return np.concatenate(parts, dtype=np.int32)

    def token_bytes(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns how many bytes of text tokens `start` to `stop` of a document stand for.

        Of training documents with a tokenizer whose ids don't tell, that is an estimate.
        """
        if self._token_bytes is None:
            return self._tokenizer.token_bytes[self.tokens(document, start, stop)]
        begin = int(self._begin[document])
        return self._token_bytes[begin + start : min(begin + stop, int(self._begin[document + 1]))].astype(np.int64)

    def text(self, document: int) -> bytes:
        """Returns the bytes of a document."""
        return self._tokenizer.to_bytes(self.tokens(document))

    def _record(self, number: int) -> np.ndarray:
        if number in self._kept:
            return self._kept[number]
        try:
            tokens = self._source[number]["tokens"]
        except Exception as error:
            raise UserError(
                f"{self._folder}: record {number} cannot be read ({first_line(error)}); the `{PROGRAM} prepare` "
                "that made the folder repairs it"
            ) from error
        if self._kept_bytes + tokens.nbytes <= KEPT_BYTES:
            # A long document is read a range at a time. Two reader threads may count one record twice, which only
            # keeps a little less.
            self._kept[number] = tokens
            self._kept_bytes += tokens.nbytes
        return tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared source.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of the tokens and names of all documents and of the tokenizer.
      tokenizer: of the token ids.
      train, held_out: documents.
      folder: where it is.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    train: TokenDocuments
    held_out: TokenDocuments
    folder: Path
    counts_bytes: bool = True
    """Whether losses can be reported per byte."""

    def describe(self) -> dict[str, Any]:
        """Returns what a run's banner and result say of the corpus, JSON-ready."""
        sizes = {
            name: {
                "documents": len(part),
                "tokens": int(part.lengths.sum()),
                "bytes": int(part.byte_lengths.sum()),
                "unknown_bytes": part.unknown_bytes,
            }
            for name, part in (("train", self.train), ("held_out", self.held_out))
        }
        return {"source": self.name, "digest": self.digest, "tokenizer": self.tokenizer.name, **sizes}


def open_prepared(source: str, tokenizer: str | None = None, start: str | None = None) -> Prepared:
    """Returns the prepared text of `source`; prepared into the cache on first use, if it is no prepared folder.

    Args:
      source: a folder made by `python main.py prepare`, "stdlib", a path, or "tfds:NAME".
      tokenizer: "bytes", "bpe:SIZE" or the path of a tokenizer.json; None for the folder's own, else "bytes".
      start: the token of a tokenizer.json that opens documents, if it has an unusual name.

    Raises:
      UserError: no such source or tokenizer, nothing in it, a folder that is unfinished, damaged or of another
        tokenizer.
    """
    folder = expanded(source, f"source={source!r}")
    if is_prepared(folder):
        _check_tokenizer(folder, read_manifest(folder)["tokenizer"], tokenizer)
        return _open(source, folder)
    # Looking at the source comes first: what is in the cache may be of an older state of it.
    preparation = Preparation(source, tokenizer or "bytes", start=start)
    folder = cache_folder() / "prepared" / preparation.key[:20]
    if not os.path.exists(folder / MANIFEST):
        preparation.into(folder, log=lambda line: print(line, file=sys.stderr))
    return _open(source, folder)


def _check_tokenizer(folder: Path, described: dict[str, Any], name: str | None) -> None:
    if name is None or name == described["name"]:
        return
    is_file = name != "bytes" and not name.startswith("bpe:")
    if not is_file or open_tokenizer(name, described["start_token"]).digest != described["digest"]:
        raise UserError(
            f"tokenizer={name!r}: {folder} was prepared with {described['name']!r}; leave the tokenizer out"
        )


def _open(name: str, folder: Path) -> Prepared:
    manifest = read_manifest(folder)
    size = sum(shard["size"] for split in manifest["splits"].values() for shard in split["shards"])
    check_files(folder, manifest, contents=size <= CHECKED_BYTES)
    described = manifest["tokenizer"]
    file = "bytes" if described["name"] == "bytes" else str(folder / TOKENIZER_FILE)
    tokenizer = open_tokenizer(file, described["start_token"])
    if tokenizer.digest != described["digest"]:
        raise UserError(f"{file}: is not as it was written; the `{PROGRAM} prepare` that made the folder repairs it")
    tokenizer.name = described["name"]
    train, held_out = (
        TokenDocuments(folder, split, tokenizer, manifest["splits"][split]["unknown_bytes"])
        for split in ("train", "held_out")
    )
    return Prepared(name, manifest["digest"], tokenizer, train, held_out, folder)
