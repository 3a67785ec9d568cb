"""Prepared text: documents as tokens, with their lengths, read piece by piece.

prepared = open_prepared("stdlib", None)         # or a folder made by `python main.py prepare`, a path, or "tfds:NAME"
prepared.train.lengths[0]                        # tokens of the first document, the opening one included
prepared.train.tokens(0, 0, 512)                 # its first 512 tokens at most
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import Documents, open_corpus
from data.tokenizers import ByteTokenizer, Tokenizer, open_tokenizer


class TokenDocuments:
    """Documents of one split as tokens.

    Attributes:
      lengths: (documents,) int64, tokens of each, the opening one included.
      byte_lengths: (documents,) int64, bytes of text of each.
    """

    def __init__(self, documents: Documents):
        self._documents = documents
        self._tokenizer = ByteTokenizer()
        self.byte_lengths = documents.byte_lengths
        self.lengths = self.byte_lengths + 1

    def __len__(self) -> int:
        return len(self._documents)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` (None: the end) of a document, (stop - start,) int32."""
        return self._tokenizer.encode(self._documents[document], start, stop)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared source.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal, of the tokens of all documents and the tokenizer.
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
    """The prepared text of `source`; prepared into the cache on first use.

    Args:
      source: a folder made by `python main.py prepare`, "stdlib", a path, or "tfds:NAME".
      tokenizer: None takes the folder's own, else "bytes".

    Raises:
      UserError: no such source or tokenizer, or nothing in it.
    """
    opened = open_tokenizer(tokenizer or "bytes")
    corpus = open_corpus(source)
    return Prepared(source, corpus.digest, opened, TokenDocuments(corpus.train), TokenDocuments(corpus.held_out), corpus.folder)
