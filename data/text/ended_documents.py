"""Documents with the token that ends them, so that a model learns where texts end."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from recollect.data.text.rows.base import Documents


class EndedDocuments:
    """Documents for training: after its last token each has `end`, which is a target like any other.

    The token that opens a document is also the one that ends it: wherever a model generates it, another document would
    begin. (GPT-2's <|endoftext|> does both.) Held-out documents go without, as it stands for no byte of text.

    Attributes:
      lengths: tokens of each document, the opening and the ending one included.
    """

    def __init__(self, documents: Documents, end: int):
        self.lengths: Int[np.ndarray, " documents"] = documents.lengths + 1
        self._documents = documents
        self._end = np.array([end], np.int32)

    def tokens(self, document: int, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns tokens `start` to `stop` of a document; fewer where it ends before."""
        length = int(self.lengths[document])
        tokens = self._documents.tokens(document, start, min(stop, length - 1))
        return np.concatenate([tokens, self._end]) if start < length <= stop else tokens
