"""What every tokenizer can do, and the one whose tokens are the bytes of the text."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from recollect.configuration import UserError
from recollect.data.tokenizers.text_chunks import text_chunks

START = 256


class MeasuredIds(NamedTuple):
    """Ids of a text, the bytes of it that each stands for, and how many bytes are unknown to the tokenizer."""

    ids: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    unknown_bytes: int


class Tokenizer(abc.ABC):
    """Base of the tokenizers.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of all that decides the ids of a text.
      vocabulary: number of ids.
      start: id of the token that opens every document.
      start_token: its name; None where it has none.
      token_bytes: bytes of text that each id stands for; 0 for special ones.
      exact: whether that holds for every text, so that the bytes of a text are the sum over its ids.
      unknown: id of the token for text that the vocabulary cannot write; None where it can write any.
      file: content of its tokenizer.json; None where it needs none.
    """

    name: str
    digest: str
    vocabulary: int
    start: int
    start_token: str | None = None
    token_bytes: Int[np.ndarray, " vocabulary"]
    exact: bool = True
    unknown: int | None = None
    file: bytes | None = None

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        """Returns the ids of a document, `start` first.

        Raises:
          UserError: the text holds a lone surrogate, which no encoding has.
        """
        try:
            raw = text.encode("utf-8") if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} of the prompt, {text[error.start]!r}, is not text") from None
        return np.concatenate([np.array([self.start], np.int32), *map(self.ids, text_chunks(raw))])

    def identity(self) -> dict[str, str | None]:
        """Returns "name", "digest" and "start_token": what checkpoints and exports say of it, JSON-ready."""
        return {"name": self.name, "digest": self.digest, "start_token": self.start_token}

    @abc.abstractmethod
    def ids(self, text: bytes) -> Int[np.ndarray, " n"]:
        """Returns the ids of a chunk from within a document, without `start`."""

    def measured_ids(self, text: bytes) -> MeasuredIds:
        """Returns the ids of a chunk, as `ids`, with the bytes of the text that each stands for there."""
        ids = self.ids(text)
        return MeasuredIds(ids, self.token_bytes[ids], 0)

    def unknown_bytes(self, text: bytes, ids: Int[np.ndarray, " n"]) -> int:
        """Returns how many bytes of a chunk, whose ids are given, the tokenizer does not know: measured where some are.

        Cheaper than `measured_ids`, and blind to what a tokenizer that has a token for the unknown drops without one.
        """
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens; what is not UTF-8 shows as the replacement character."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def decode_document(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, up to where another document begins."""
        numbers = [int(number) for number in ids]
        return self.decode(numbers[: numbers.index(self.start, 1)] if self.start in numbers[1:] else numbers)

    def continuation(self, prompt: Iterable[int], ids: Iterable[int]) -> str:
        """Returns the text of ids as it reads after those of `prompt`, up to where another document begins.

        Both are decoded together: alone, tokens that begin a word lose the space before it.
        """
        first, more = list(prompt), list(ids)
        before, whole = self.decode_document(first), self.decode_document(first + more)
        return whole.removeprefix(before) if whole.startswith(before) else self.decode_document(more)

    def continued(self, prompt: str, ids: Iterable[int]) -> str:
        """Returns a prompt and the text of the ids that follow it."""
        first = self.encode(prompt).tolist()
        more = self.continuation(first, ids)
        # A tokenizer that drops the spaces at the end of a text writes one before the next word.
        dropped = prompt.endswith(" ") and not self.decode_document(first).endswith(" ")
        return prompt + (more.removeprefix(" ") if dropped else more)

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
