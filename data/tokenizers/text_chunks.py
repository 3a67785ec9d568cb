"""Long texts in chunks that fit in memory, each of whole characters and, where there are line breaks, whole lines.

Where a text is cut is a function of the text alone, so a tokenizer that works chunk by chunk gives the same ids every
time.
"""

import codecs
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20


def text_chunks(text: bytes) -> Iterator[bytes]:
    """Yields a text in chunks of at most `CHUNK_BYTES` bytes, in order; nothing for an empty one."""
    return _chunks(io.BytesIO(text), len(text))


def file_chunks(path: str | Path, begin: int, end: int) -> Iterator[bytes]:
    """Yields the bytes `begin` to `end` of a file in chunks of at most `CHUNK_BYTES` bytes.

    Raises:
      EOFError: the file is shorter.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        yield from _chunks(file, end - begin)


def stream_chunks(file: BinaryIO, size: float = math.inf) -> Iterator[bytes]:
    """Yields the next `size` bytes of a stream, fewer where it ends, in the chunks that a file of this text has."""
    waiting = b""
    while True:
        while len(waiting) <= CHUNK_BYTES and (block := file.read(int(min(CHUNK_BYTES, size)))):
            waiting += block
            size -= len(block)
        if len(waiting) <= CHUNK_BYTES:
            break
        cut = _cut(waiting[:CHUNK_BYTES])
        yield waiting[:cut]
        waiting = waiting[cut:]
    if waiting:
        yield waiting


def character_border(text: bytes, at: int) -> int:
    """Returns the last position at or before `at` that does not split a character; never 0.

    The bytes of a character that may continue after `at` are excluded. Bytes that are not UTF-8 are cut anywhere.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[max(at - 4, 0) : at])
    return at - len(decoder.getstate()[0]) or at


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    rest = b""
    while size > 0:
        block = file.read(min(CHUNK_BYTES - len(rest), size))
        if not block:
            raise EOFError("the file is shorter than it was")
        size -= len(block)
        block = rest + block
        cut = len(block) if size == 0 else _cut(block)
        yield block[:cut]
        rest = block[cut:]


def _cut(block: bytes) -> int:
    """Returns where a block that is not the last ends: at its last line break, or else at a character's."""
    return block.rfind(b"\n") + 1 or character_border(block, len(block))
