"""Text to token ids and back.

Bytes need no training, no download and no vocabulary file, and any text of any language can be written with them. The one token
beside the 256 bytes, START, opens every document: from it the model predicts the first byte, and generation begins there.

Easy to get wrong: a cut in the middle of a text may split a character of several bytes, so decoding replaces what is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

START = 256


class ByteTokenizer:
    """UTF-8 bytes as ids 0 .. 255, and START = 256."""

    vocabulary = 257

    def encode(self, text: str | bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids of a document, START first, (bytes + 1,) int32; or its tokens `start` to `stop` only."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        piece = np.frombuffer(raw, np.uint8)[max(start - 1, 0) : None if stop is None else max(stop - 1, 0)].astype(np.int32)
        return piece if start > 0 or stop == 0 else np.concatenate([np.array([START], np.int32), piece])

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; START is left out and bytes that are not UTF-8 show as the replacement character."""
        return bytes(int(token) for token in tokens if int(token) != START).decode("utf-8", errors="replace")
