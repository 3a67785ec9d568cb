"""Long texts in stretches that fit in memory, each of whole characters and, where there are line breaks, whole lines.

Where a text is cut is a function of the text alone, so that a tokenizer that works on stretches gives the same ids each
time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

STRETCH = 1 << 20


def stretches(text: bytes | str) -> Iterator[bytes]:
    """The text in stretches of at most `STRETCH` bytes, in order; none of an empty one."""
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return file_stretches(io.BytesIO(raw), len(raw)) if len(raw) > STRETCH else iter([raw] if raw else [])


def file_stretches(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file in stretches of at most `STRETCH` bytes."""
    kept = b""
    while size > 0:
        block = file.read(min(STRETCH - len(kept), size))
        if not block:
            raise EOFError("the file is shorter than it was")
        size -= len(block)
        block = kept + block
        at = len(block) if size == 0 else block.rfind(b"\n") + 1 or character_border(block, len(block))
        yield block[:at]
        kept = block[at:]


def character_border(text: bytes, at: int) -> int:
    """The last place at or before `at` where a character may begin or the text ends, if the last character may be cut
    off.

    A place is taken for a border only when what begins before it is whole: the one or more bytes of the last character
    that begins before `at` are given back unless they are all there. Bytes that are not UTF-8 are cut anywhere, but
    never at 0.
    """
    for back in range(1, min(4, at) + 1):
        byte = text[at - back]
        if byte & 0xC0 == 0x80:
            continue
        length = (
            1
            if byte < 0x80
            else 2
            if byte >> 5 == 0b110
            else 3
            if byte >> 4 == 0b1110
            else 4
            if byte >> 3 == 0b11110
            else back
        )
        return at if length <= back or at == back else at - back
    return at
