"""Prepared text: documents as tokens, with their lengths, read piece by piece.

    prepared = open_prepared("stdlib")               # or a folder made by `python main.py prepare`, a path, "tfds:NAME"
    prepared.train.lengths[0]                        # tokens of the first document, the opening one included
    prepared.train.tokens(0, 0, 512)                 # its first 512 tokens at most

What is not a prepared folder is prepared into the cache folder on first use, in this process: `python main.py prepare`
does the same in several, with a tokenizer of its own.

Easy to get wrong: a split is one stream of tokens, cut into records; a document of over 65,536 tokens lies in several,
and any document of a text file whose tasks cut it may.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.configuration.paths import cache_folder
from recollect.data.text.preparation.manifest import MANIFEST, TOKENIZER_FILE, check_files, is_prepared, read_manifest
from recollect.data.text.preparation.prepare import Preparation
from recollect.data.tokenizers import Tokenizer, open_tokenizer

__all__ = ["Prepared", "TokenDocuments", "cache_folder", "open_prepared"]

KEPT_BYTES = 1 << 28
CHECKED_BYTES = 1 << 28
"""Shards of up to this many bytes in all are compared with their digests whenever they are opened; larger ones by
size."""


class TokenDocuments:
    """Documents of one split as tokens, read when asked for; the first `KEPT_BYTES` of them stay in memory.

    Attributes:
      lengths: (documents,) int64, tokens of each, the opening one included.
      byte_lengths: (documents,) int64, bytes of text of each.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self.lengths, self.byte_lengths = np.load(folder / f"{split}-documents.npy")
        self._begin = np.concatenate([[0], np.cumsum(self.lengths)])
        self._record_begin = np.concatenate([[0], np.cumsum(np.load(folder / f"{split}-records.npy"))])
        self._source = tfds.builder_from_directory(folder).as_data_source(split=split)
        self._folder = folder
        self._tokenizer = tokenizer
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` (None: the end) of a document, (stop - start,) int32; fewer where it ends before.

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
        found = np.empty(end - begin, np.int32)
        record = int(np.searchsorted(self._record_begin, begin, side="right")) - 1
        at = begin
        while at < end:
            offset, upto = int(self._record_begin[record]), min(int(self._record_begin[record + 1]), end)
            found[at - begin : upto - begin] = self._record(record)[at - offset : upto - offset]
            at, record = upto, record + 1
        return found

    def text(self, document: int) -> bytes:
        """Bytes of a document."""
        return self._tokenizer.to_bytes(self.tokens(document))

    def _record(self, number: int) -> np.ndarray:
        if number in self._kept:
            return self._kept[number]
        try:
            tokens = self._source[number]["tokens"]
        except Exception as error:
            raise UserError(
                f"{self._folder}: record {number} cannot be read ({' '.join(str(error).split())[:200]}); the `python main.py prepare` "
                "that made the folder repairs it"
            ) from error
        if self._kept_bytes + tokens.nbytes <= KEPT_BYTES:
            # A long document is asked for once a piece. Reader threads may count one twice, which keeps a little less.
            self._kept[number] = tokens
            self._kept_bytes += tokens.nbytes
        return tokens


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of the tokens and names of all documents and of the tokenizer.
      tokenizer: what the ids mean.
      train, held_out: documents.
      folder: where it is.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    train: TokenDocuments
    held_out: TokenDocuments
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Facts for a run's banner and result, JSON-ready."""
        parts = {"train": self.train, "held_out": self.held_out}
        sizes = {
            name: {"documents": len(part), "tokens": int(part.lengths.sum()), "bytes": int(part.byte_lengths.sum())}
            for name, part in parts.items()
        }
        return {"source": self.name, "digest": self.digest, "tokenizer": self.tokenizer.name, **sizes}


def open_prepared(source: str, tokenizer: str | None = None) -> Prepared:
    """The prepared text of `source`; prepared into the cache on first use, if it is no prepared folder.

    Args:
      source: a folder made by `python main.py prepare`, "stdlib", a path, or "tfds:NAME".
      tokenizer: "bytes", "bpe:SIZE" or the path of a tokenizer.json; None takes the folder's own, else "bytes".

    Raises:
      UserError: no such source or tokenizer, nothing in it, a folder that is unfinished, damaged or of another
        tokenizer.
    """
    folder = Path(source).expanduser()
    if is_prepared(folder):
        manifest = read_manifest(folder)
        _check_tokenizer(folder, manifest["tokenizer"], tokenizer)
        return _open(source, folder, manifest)
    return _open_cached(source, tokenizer or "bytes")


def _check_tokenizer(folder: Path, own: dict[str, Any], wanted: str | None) -> None:
    if wanted is None or wanted == own["name"]:
        return
    if (
        wanted == "bytes"
        or wanted.startswith("bpe:")
        or open_tokenizer(wanted, own["start_token"]).digest != own["digest"]
    ):
        raise UserError(f"tokenizer={wanted!r}: {folder} was prepared with {own['name']!r}; leave the tokenizer out")


def _open_cached(source: str, tokenizer: str) -> Prepared:
    # Looking at the source comes first: what is in the cache may be of an older state of it.
    preparation = Preparation.of(source, tokenizer)
    folder = cache_folder() / "prepared" / preparation.key[:20]
    if not (folder / MANIFEST).exists():
        preparation.into(folder, say=lambda line: print(line, file=sys.stderr))
    return _open(source, folder, read_manifest(folder))


def _open(name: str, folder: Path, manifest: dict[str, Any]) -> Prepared:
    size = sum(shard["size"] for split in manifest["splits"].values() for shard in split["shards"])
    check_files(folder, manifest, contents=size <= CHECKED_BYTES)
    own = manifest["tokenizer"]
    tokenizer = open_tokenizer("bytes" if own["name"] == "bytes" else str(folder / TOKENIZER_FILE), own["start_token"])
    if tokenizer.digest != own["digest"]:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: is not as it was written; the `python main.py prepare` that made the folder repairs it"
        )
    tokenizer.name = own["name"]
    train, held_out = (TokenDocuments(folder, split, tokenizer) for split in ("train", "held_out"))
    return Prepared(name, manifest["digest"], tokenizer, train, held_out, folder)
