"""Reading documents out of files, a unit at a time.

A unit is a part of a source that any process can read on its own: a file, a range of lines of a .jsonl file, of row
groups of a
.parquet file, of examples of a TFDS data set, or of a text file that is one long document. Its documents stream: none
but the lines of .jsonl and the rows of a .parquet file are ever whole in memory.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.data.text.preparation.text_chunks import STRETCH, file_stretches, stretches

_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source.

    Attributes:
      kind: "text", "jsonl", "gzip" (.jsonl.gz), "parquet" or "tfds".
      path: file; of "tfds" the data set's folder.
      name: what its document is called, or how the names of its documents begin.
      begin, end: bytes of "text" and "jsonl", row groups of "parquet", examples of "tfds".
      first: number of its first line, row or example.
      size: about how many bytes it has, for sharing out the work.
      field: key, column or feature that holds the text.
      split: "train" or "held_out", when that doesn't depend on the documents' names.
      continues: it goes on with the document of the unit before.
    """

    kind: str
    path: str
    name: str
    begin: int
    end: int
    size: int
    first: int = 1
    field: str = "text"
    split: str | None = None
    continues: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a part of one: its text in stretches of bytes, to be read before the next document is asked
    for."""

    name: str
    stretches: Iterator[bytes]
    continues: bool = False


def kind_of(path: Path) -> str:
    """How a file is read, by its name: all that is not .jsonl, .jsonl.gz or .parquet is taken for text."""
    name = path.name.lower()
    if name.endswith(".jsonl.gz"):
        return "gzip"
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "text")


def read_unit(unit: Unit) -> Iterator[Document]:
    """The documents of a unit that have text, in order. A text file that is not UTF-8 has none.

    Raises:
      UserError: a line or row without text, or a file that can't be read; the message names it.
    """
    try:
        yield from _READERS[unit.kind](unit)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{unit.path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def is_utf8(path: str | Path, begin: int = 0, end: int | None = None) -> bool:
    """Whether the bytes `begin` to `end` of a file are UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        file.seek(begin)
        left = -1 if end is None else end - begin
        try:
            while left and (block := file.read(STRETCH if left < 0 else min(STRETCH, left))):
                decoder.decode(block)
                left -= len(block) if left > 0 else 0
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _read_text(unit: Unit) -> Iterator[Document]:
    if unit.end - unit.begin > STRETCH:
        if is_utf8(unit.path, unit.begin, unit.end):
            yield Document(unit.name, _range(unit), unit.continues)
        return
    with open(unit.path, "rb") as file:
        file.seek(unit.begin)
        raw = file.read(unit.end - unit.begin)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    if raw:
        yield Document(unit.name, iter([raw]), unit.continues)


def _range(unit: Unit) -> Iterator[bytes]:
    with open(unit.path, "rb") as file:
        file.seek(unit.begin)
        yield from file_stretches(file, unit.end - unit.begin)


def _read_jsonl(unit: Unit) -> Iterator[Document]:
    with open(unit.path, "rb") as file:
        file.seek(unit.begin)
        number, left = unit.first, unit.end - unit.begin
        while left > 0 and (line := file.readline()):
            yield from _line(unit, number, line)
            number, left = number + 1, left - len(line)


def _read_gzip(unit: Unit) -> Iterator[Document]:
    number = unit.first
    with gzip.open(unit.path, "rb") as file:
        try:
            for number, line in enumerate(file, start=unit.first):
                yield from _line(unit, number, line)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{unit.path}, after line {number}: cannot be unpacked ({error})") from error


def _line(unit: Unit, number: int, line: bytes) -> Iterator[Document]:
    if not line.strip():
        return
    try:
        text = json.loads(line)[unit.field]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{unit.path}, line {number}: expected a JSON object with a string {unit.field!r}")
    if text:
        # JSON can write lone surrogates, which UTF-8 can't.
        yield Document(f"{unit.name}:{number}", stretches(text.encode("utf-8", errors="replace")))


def open_parquet(path: str | Path, field: str) -> Any:
    """The `pyarrow.parquet.ParquetFile`, which has a column `field` of text.

    Raises:
      UserError: no parquet file, or no such column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no parquet file ({' '.join(str(error).split())})") from error
    schema = file.schema_arrow
    if field not in schema.names:
        raise UserError(f"{path}: has no column {field!r}, only {', '.join(schema.names)}; name one with --field")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {field!r} holds {kind}, not strings")
    return file


def _read_parquet(unit: Unit) -> Iterator[Document]:
    import pyarrow

    number = unit.first
    file = open_parquet(unit.path, unit.field)
    try:
        for rows in file.iter_batches(_ROWS, row_groups=range(unit.begin, unit.end), columns=[unit.field]):
            for text in rows.column(0).to_pylist():
                if text:
                    yield Document(f"{unit.name}:{number}", stretches(text.encode("utf-8", errors="replace")))
                number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{unit.path}, near row {number}: cannot be read ({' '.join(str(error).split())})") from error
    finally:
        file.close()


@functools.lru_cache(maxsize=8)
def _tfds_source(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split=split)


def _read_tfds(unit: Unit) -> Iterator[Document]:
    source = _tfds_source(unit.path, unit.name)
    for number in range(unit.begin, unit.end):
        text = source[number][unit.field]
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if raw:
            yield Document(f"{unit.name}/{number}", stretches(raw))


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "gzip": _read_gzip, "parquet": _read_parquet, "tfds": _read_tfds}
