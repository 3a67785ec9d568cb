"""Documents of files, read one source part at a time.

A part of a source can be read by any process on its own: a file, a range of lines of a .jsonl file, of row groups of a
.parquet file, of examples of a TFDS data set, or of bytes of a text file that is one long document. Its documents
stream: only lines of .jsonl files and rows of .parquet files are ever whole in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.tokenizers.text_chunks import file_chunks, is_utf8, text_chunks

_ROWS = 256


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """A part of a source.

    Attributes:
      kind: "text", "jsonl", "gzip" (.jsonl.gz), "parquet" or "tfds".
      path: the file; of "tfds" the data set's folder.
      name: the name of its document, or what the names of its documents begin with; of "tfds" the split.
      begin, end: bytes of "text" and "jsonl", row groups of "parquet", examples of "tfds".
      size: about how many bytes it has, for sharing out the work.
      first: number of its first line, row or example.
      field: key, column or feature that holds the text.
      split: "train" or "held_out" where that doesn't depend on the documents' names.
      continues: its first document began in the part before.
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


class Document(NamedTuple):
    """A document, or a part of one: its name, and its text in chunks, to be read before the next document."""

    name: str
    chunks: Iterator[bytes]


def kind_of(path: Path) -> str:
    """Returns how a file is read, by its name: all but .jsonl, .jsonl.gz and .parquet files are text."""
    if path.name.lower().endswith(".jsonl.gz"):
        return "gzip"
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "text")


def read_documents(part: SourcePart) -> Iterator[Document]:
    """Yields the documents of a part that have text, in order; none of a text file that is not UTF-8.

    Raises:
      UserError: a line or row without text, or a file that can't be read; the message names it.
    """
    try:
        yield from _READERS[part.kind](part)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{part.path}: cannot be read ({first_line(error)})") from error


def _read_text(part: SourcePart) -> Iterator[Document]:
    if is_utf8(part.path, part.begin, part.end):
        yield Document(part.name, file_chunks(part.path, part.begin, part.end))


def _read_lines(part: SourcePart) -> Iterator[Document]:
    compressed = part.kind == "gzip"
    opener: Any = gzip.open if compressed else open
    left = math.inf if compressed else part.end - part.begin
    number = part.first
    try:
        with opener(part.path, "rb") as file:
            file.seek(part.begin)
            for number, line in enumerate(file, part.first):
                yield from _line(part, number, line)
                left -= len(line)
                if left <= 0:
                    break
    except (OSError, EOFError, zlib.error) as error:
        problem = "unpacked" if compressed else "read"
        raise UserError(f"{part.path}, after line {number}: cannot be {problem} ({first_line(error)})") from error


def _line(part: SourcePart, number: int, line: bytes) -> Iterator[Document]:
    if not line.strip():
        return
    try:
        text = json.loads(line)[part.field]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{part.path}, line {number}: expected a JSON object with a string {part.field!r}")
    yield from _document(part, number, text)


def _document(part: SourcePart, number: int, text: str | None) -> Iterator[Document]:
    if text:
        # JSON can hold lone surrogates, which UTF-8 cannot.
        yield Document(f"{part.name}:{number}", text_chunks(text.encode("utf-8", errors="replace")))


def open_parquet(path: str | Path, field: str) -> Any:
    """Returns the `pyarrow.parquet.ParquetFile`, whose column `field` is known to hold text.

    Raises:
      UserError: no parquet file, or no such column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is no parquet file ({first_line(error)})") from error
    schema = file.schema_arrow
    if field not in schema.names:
        raise UserError(f"{path}: has no column {field!r}, only {', '.join(schema.names)}; name one with --field")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {field!r} holds {kind}, not strings")
    return file


def _read_parquet(part: SourcePart) -> Iterator[Document]:
    import pyarrow

    number = part.first
    try:
        with open_parquet(part.path, part.field) as file:
            for rows in file.iter_batches(_ROWS, row_groups=range(part.begin, part.end), columns=[part.field]):
                for offset, text in enumerate(rows.column(0).to_pylist()):
                    yield from _document(part, number + offset, text)
                number += rows.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{part.path}, near row {number}: cannot be read ({first_line(error)})") from error


@functools.lru_cache(maxsize=8)
def _tfds_source(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split=split)


def _read_tfds(part: SourcePart) -> Iterator[Document]:
    source = _tfds_source(part.path, part.name)
    for number in range(part.begin, part.end):
        text = source[number][part.field]
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if raw:
            yield Document(f"{part.name}/{number}", text_chunks(raw))


_READERS = {
    "text": _read_text,
    "jsonl": _read_lines,
    "gzip": _read_lines,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
