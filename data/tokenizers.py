"""Text to token ids and back.

Bytes need no training, no download and no vocabulary file, and any text of any language can be written with them. The one token
beside the 256 bytes, START, opens every document: from it the model predicts the first byte, and generation begins there.

Easy to get wrong: a cut in the middle of a text may split a character of several bytes, so decoding replaces what is not UTF-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from configuration import UserError

START = 256


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

    def encode(self, text: str | bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids of a document, START first, (bytes + 1,) int32; or its tokens `start` to `stop` only."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        piece = np.frombuffer(raw, np.uint8)[max(start - 1, 0) : None if stop is None else max(stop - 1, 0)].astype(np.int32)
        return piece if start > 0 or stop == 0 else np.concatenate([np.array([START], np.int32), piece])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; START is left out and bytes that are not UTF-8 show as the replacement character."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, START left out."""
        found = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        return found[found != START].astype(np.uint8).tobytes()


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`.

    Raises:
      UserError: there is none of that name.
    """
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"tokenizer={name!r}: must be bytes")
