"""The items of a JSON array, or a single JSON value, without holding the whole file in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

_BLOCK = 1 << 20
_SPACE = " \t\n\r"


def json_items(file: BinaryIO) -> Iterator[Any]:
    """Yields the items of the JSON array in a file of UTF-8 bytes, or its one value where that is no array.

    Raises:
      json.JSONDecodeError: it is not JSON; a position in the message counts from the item.
      RecursionError: an item is nested too deeply.
    """
    text = _Text(file)
    if text.peek() != "[":
        yield text.value()
        _expect_end(text)
        return
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            mark = text.peek()
            text.skip()
            if mark == "]":
                break
            if mark != ",":
                raise json.JSONDecodeError("the array does not end, or an item has no comma after it", "", 0)
    _expect_end(text)


def _expect_end(text: _Text) -> None:
    if text.peek():
        raise json.JSONDecodeError("something follows after its end", "", 0)


class _Text:
    """Characters of a file from where it was read to."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """Returns the next character that is no white space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def skip(self) -> None:
        """Goes one character on."""
        self._at += 1

    def value(self) -> Any:
        """Returns the JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
                # A number may go on in what was not read yet.
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError:
                if self._ended:
                    raise
            self._more()

    def _more(self) -> None:
        """Reads on: as much again as waits, so that the time for a long item stays linear."""
        rest = self._text[self._at :]
        block = self._file.read(max(_BLOCK, len(rest)))
        self._ended = not block
        self._text, self._at = rest + self._decoder.decode(block, final=not block), 0
