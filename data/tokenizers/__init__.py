"""Text to token ids and back.

    tokenizer = open_tokenizer("bytes")              # or the path of a tokenizer.json; data/tokenizers/huggingface.py has those
    tokenizer.encode("naïve")                        # ids, the opening one first

Bytes need no training, no download and no vocabulary file, and any text of any language can be written with them. The
one token
beside the 256 bytes, START, opens every document: from it the model predicts the first byte, and generation begins
there.

Easy to get wrong: a cut in the middle of a text may split a character of several bytes, so decoding replaces what is
not UTF-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from recollect.configuration import UserError

START = 256
SMALLEST_BPE = 257


class Tokenizer(Protocol):
    """What every tokenizer has.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of all that decides the ids of a text.
      vocabulary: number of ids.
      start: id of the token that opens every document.
      token_bytes: (vocabulary,) int32, bytes of text that each id stands for; 0 for special ones.
    """

    name: str
    digest: str
    vocabulary: int
    start: int
    token_bytes: np.ndarray

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a document, (n,) int32, `start` first."""
        ...

    def ids(self, text: bytes) -> np.ndarray:
        """Ids of a stretch from within a document, (n,) int32, without `start`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out and bytes that are not UTF-8 show as the replacement character."""
        ...

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; special tokens are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 .. 255, and START = 256."""

    name = "bytes"
    digest = hashlib.sha256(b"bytes 0-255, start 256").hexdigest()
    vocabulary = 257
    start = START
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a document, START first, (bytes + 1,) int32."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.concatenate([np.array([START], np.int32), self.ids(raw)])

    def ids(self, text: bytes) -> np.ndarray:
        """The bytes themselves, (bytes,) int32."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; START is left out and bytes that are not UTF-8 show as the replacement character."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, START left out."""
        found = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        return found[found != START].astype(np.uint8).tobytes()


def open_tokenizer(name: str, start: str | None = None) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a tokenizer.json.

    Args:
      name: "bytes" or a path.
      start: the special token of a tokenizer.json that opens documents; None looks for one of the usual names.

    Raises:
      UserError: there is none of that name, or it has no token that could open a document.
    """
    if name == "bytes":
        if start is not None:
            raise UserError(
                f"start={start!r}: only a tokenizer.json has named tokens; bytes open a document with their own"
            )
        return ByteTokenizer()
    if name.startswith("bpe:"):
        raise UserError(
            f"tokenizer={name!r}: is trained on a source, by `python main.py prepare SOURCE OUT --tokenizer {name}`"
        )
    # Importing tokenizers takes a moment, which byte models needn't pay.
    from recollect.data.tokenizers.huggingface import FileTokenizer

    return FileTokenizer(name, start=start)


def tokenizer_file(path: str) -> Path:
    """Where the tokenizer.json of a path is: the path itself, or in the folder that it names."""
    found = Path(path).expanduser()
    return found / "tokenizer.json" if found.is_dir() else found


def bpe_size(name: str) -> int | None:
    """The vocabulary that "bpe:SIZE" asks for; None for another name.

    Raises:
      UserError: the size is no number or too small.
    """
    if not name.startswith("bpe:"):
        return None
    text = name.removeprefix("bpe:")
    if not text.isascii() or not text.isdigit() or int(text) < SMALLEST_BPE:
        raise UserError(
            f"tokenizer={name!r}: bpe:SIZE needs a size of at least {SMALLEST_BPE} (256 bytes and a start token)"
        )
    return int(text)
