"""What every tokenizer can do, and the one whose tokens are the bytes of the text."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from recollect.data.tokenizers.text_chunks import text_chunks

START = 256


class Tokenizer(abc.ABC):
    """Base of the tokenizers.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of all that decides the ids of a text.
      vocabulary: number of ids.
      start: id of the token that opens every document.
      start_token: its name; None where it has none.
      token_bytes: bytes of text that each id stands for; 0 for special ones.
      file: content of its tokenizer.json; None where it needs none.
    """

    name: str
    digest: str
    vocabulary: int
    start: int
    start_token: str | None = None
    token_bytes: Int[np.ndarray, " vocabulary"]
    file: bytes | None = None

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        """Returns the ids of a document, `start` first."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.concatenate([np.array([self.start], np.int32), *map(self.ids, text_chunks(raw))])

    @abc.abstractmethod
    def ids(self, text: bytes) -> Int[np.ndarray, " n"]:
        """Returns the ids of a chunk from within a document, without `start`."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens; what is not UTF-8 shows as the replacement character."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def decode_document(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, up to where another document begins."""
        numbers = [int(number) for number in ids]
        return self.decode(numbers[: numbers.index(self.start, 1)] if self.start in numbers[1:] else numbers)

    @abc.abstractmethod
    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, without special tokens."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 .. 255, and START = 256."""

    name = "bytes"
    digest = hashlib.sha256(b"bytes 0-255, start 256").hexdigest()
    vocabulary = 257
    start = START
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def ids(self, text: bytes) -> Int[np.ndarray, " n"]:
        """Returns the bytes themselves."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, without START."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        return array[array != START].astype(np.uint8).tobytes()
