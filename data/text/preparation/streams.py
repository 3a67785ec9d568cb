"""Files as streams of UTF-8 bytes, whatever they are packed with and however their characters are encoded.

with open_utf8(path, codec_of(head), encoding_of(head)[0]) as file: ...
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from recollect.configuration import UserError

BLOCK = 1 << 20
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)
"""What a file that cannot be read, unpacked or decoded raises."""


def _open_zstandard(path: str | Path) -> BinaryIO:
    import pyarrow

    # The file is opened by Python, since other libraries cannot name every file that Python can.
    stream: Any = pyarrow.CompressedInputStream(io.BufferedReader(io.FileIO(path)), "zstd")
    return io.BufferedReader(stream)


_CODECS: dict[str, tuple[bytes, tuple[str, ...], Callable[..., Any]]] = {
    "gzip": (rb"\x1f\x8b\x08", (".gz", ".gzip"), gzip.open),
    "zstandard": (rb"\x28\xb5\x2f\xfd", (".zst", ".zstd"), _open_zstandard),
    "bzip2": (rb"BZh[1-9]1AY&SY", (".bz2",), bz2.open),
    "xz": (rb"\xfd7zXZ\x00", (".xz",), lzma.open),
}
"""How files are packed: name -> pattern of the first bytes, suffixes, and what opens a file of it."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def codec_of(head: bytes) -> str | None:
    """Returns what a file that begins with `head` is packed with; None for none."""
    return next((name for name, (magic, _, _) in _CODECS.items() if re.match(magic, head)), None)


def without_codec_suffix(name: str) -> tuple[str, str | None]:
    """Returns a file's name without the suffix of its packing, and what it says the file is packed with."""
    for codec, (_, suffixes, _) in _CODECS.items():
        for suffix in suffixes:
            if name.lower().endswith(suffix):
                return name[: -len(suffix)], codec
    return name, None


def encoding_of(head: bytes) -> str | None:
    """Returns the encoding that a byte order mark names; None without one."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def check_encoding(name: str) -> None:
    """Raises UserError unless Python knows a text encoding of this name."""
    try:
        "".encode(name)
    except (LookupError, ValueError, UnicodeError) as error:
        raise UserError(
            f"encoding={name!r}: no such text encoding; for example latin-1, cp1252 or shift_jis"
        ) from error


def open_unpacked(path: str | Path, codec: str | None) -> Any:
    """Returns a binary file with the bytes of a file, unpacked; raises OSError where it cannot be opened."""
    return io.BufferedReader(io.FileIO(path)) if codec is None else _CODECS[codec][2](path)


def open_utf8(path: str | Path, codec: str | None, encoding: str | None) -> BinaryIO:
    """Returns the text of a file as UTF-8 bytes.

    Args:
      path: the file.
      codec: what it is packed with.
      encoding: None or "utf-8" for bytes as they are; "utf-8-sig", "utf-16" and "utf-32" raise UnicodeError at
        bytes that they cannot read, any other replaces these.
    """
    raw = open_unpacked(path, codec)
    return raw if encoding is None else io.BufferedReader(_Transcoded(raw, encoding))


class _Transcoded(io.RawIOBase):
    """The UTF-8 bytes of a stream in another encoding."""

    def __init__(self, raw: BinaryIO, encoding: str):
        marked = encoding in {name for _, name in _MARKS}
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder(encoding)("strict" if marked else "replace")
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._raw.read(BLOCK)
            self._ended = not block
            self._ready = self._decoder.decode(block, self._ended).encode("utf-8", errors="replace")
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        super().close()
        self._raw.close()


def first_undecodable(file: BinaryIO) -> str | None:
    """Returns which byte of a stream is not UTF-8 ("byte 0xe4 at 17"); None where all are.

    Raises:
      UnicodeError: the stream is transcoded, and bytes are not of its encoding.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    while True:
        block = file.read(BLOCK)
        before = len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return f"byte 0x{error.object[error.start]:02x} at {at - before + error.start:,}"
        if not block:
            return None
        at += len(block)
