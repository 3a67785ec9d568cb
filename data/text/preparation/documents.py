"""Documents of files, read one source part at a time.

A part of a source can be read by any process on its own: a file, a range of lines of a .jsonl file, of row groups of a
.parquet file, of examples of a TFDS data set, or of bytes of a text file that is one long document. Its documents
stream: only single lines, rows and items of JSON arrays are ever whole in memory.

One rule for what has no text, in every format: a null or an empty string is no document. It is counted and reported;
anything else that is no string ends the preparation, as does a missing key or column.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.text.preparation.json_items import json_items
from recollect.data.text.preparation.streams import READ_ERRORS, open_unpacked, open_utf8
from recollect.data.tokenizers.text_chunks import file_chunks, stream_chunks, text_chunks

_ROWS = 256
OnEmpty = Callable[[str], Any]
"""Is called with the name of each row without text."""


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """A part of a source.

    Attributes:
      kind: "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow" or "tfds".
      path: the file; of "tfds" the data set's folder.
      name: the name of its document, or what the names of its documents begin with; of "tfds" the split.
      begin, end: bytes of "text" and "jsonl", row groups of "parquet", examples of "tfds".
      size: about how many bytes it has, for sharing out the work.
      first: number of its first line, row or example.
      field: key, column or feature that holds the text.
      split: "train" or "held_out" where that doesn't depend on the documents' names.
      continues: its first document began in the part before.
      codec, encoding: how the file is packed and encoded (data/text/preparation/streams.py). Where it is, `begin` and
        `end` count bytes of its text, and an `end` of 0 is that of the file.
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
    codec: str | None = None
    encoding: str | None = None

    @property
    def streamed(self) -> bool:
        """Whether bytes of the file are not those of its text."""
        return self.codec is not None or self.encoding is not None


class Document(NamedTuple):
    """A document, or a part of one: its name, and its text in chunks, to be read before the next document."""

    name: str
    chunks: Iterator[bytes]


def read_documents(part: SourcePart, on_empty: OnEmpty = lambda name: None) -> Iterator[Document]:
    """Yields the documents of a part that have text, in order.

    Raises:
      UserError: a line or row that holds no text where it should, or a file that can't be read; the message names it.
    """
    try:
        yield from _READERS[part.kind](part, on_empty)
    except READ_ERRORS as error:
        problem = "unpacked" if part.codec else "read"
        raise UserError(f"{part.path}: cannot be {problem} ({first_line(error)})") from error


def _read_text(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    yield Document(part.name, _chunks_of_text(part))


def _chunks_of_text(part: SourcePart) -> Iterator[bytes]:
    # Read after its document was yielded, so errors are named here.
    try:
        if not part.streamed:
            yield from file_chunks(part.path, part.begin, part.end)
            return
        with open_utf8(part.path, part.codec, part.encoding) as file:
            for _ in stream_chunks(file, part.begin):
                pass
            yield from stream_chunks(file, part.end - part.begin if part.end else math.inf)
    except READ_ERRORS as error:
        raise UserError(f"{part.path}: cannot be read ({first_line(error)})") from error


def _read_lines(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    left = math.inf if part.streamed else part.end - part.begin
    number = part.first
    try:
        with open_utf8(part.path, part.codec, part.encoding) as file:
            if part.begin:
                file.seek(part.begin)
            for number, line in enumerate(file, part.first):
                if line.strip():
                    yield from _document(part, number, _text_of_line(part, number, line), on_empty)
                left -= len(line)
                if left <= 0:
                    break
    except READ_ERRORS as error:
        problem = "unpacked" if part.codec else "read"
        raise UserError(f"{part.path}, after line {number}: cannot be {problem} ({first_line(error)})") from error


def _text_of_line(part: SourcePart, number: int, line: bytes) -> str | None:
    try:
        value = json.loads(line)
        return _text_of(value, part.field)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{part.path}, line {number}: expected a JSON object with a string {part.field!r}"
            + (" (nested too deeply)" if isinstance(error, RecursionError) else "")
        ) from error


def _text_of(value: Any, field: str) -> str | None:
    """Returns the text of a JSON object, None for a null; raises KeyError or TypeError where it holds none."""
    text = value[field]
    if text is not None and not isinstance(text, str):
        raise TypeError
    return text


def _read_items(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    number = part.first - 1
    try:
        with open_utf8(part.path, part.codec, part.encoding) as file:
            for number, value in enumerate(json_items(file), part.first):
                # A list of strings is a list of texts.
                text = value if isinstance(value, str) else _text_of(value, part.field)
                yield from _document(part, number, text, on_empty)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{part.path}, item {number}: expected a string, or a JSON object with a string {part.field!r}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{part.path}, after item {number}: is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{part.path}, after item {number}: is not valid JSON ({error.msg})") from error


def _read_table(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 128 KiB by default
    number = 0
    try:
        with (
            open_utf8(part.path, part.codec, part.encoding) as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
        ):
            rows = csv.reader(text, delimiter="\t" if part.kind == "tsv" else ",", strict=True)
            column = _column_of(part.path, next(rows, []), part.field)
            for number, row in enumerate((row for row in rows if row), part.first):
                if len(row) <= column:
                    raise UserError(f"{part.path}, row {number}: has {len(row)} columns, and {part.field!r} is later")
                yield from _document(part, number, row[column], on_empty)
    except csv.Error as error:
        raise UserError(f"{part.path}, after row {number}: cannot be read ({first_line(error)})") from error


def _column_of(path: str | Path, names: list[str], field: str) -> int:
    """Returns the number of the one column called `field`; raises UserError where there is none, or several."""
    count = names.count(field)
    if count > 1:
        raise UserError(f"{path}: has {count} columns {field!r}; rename one, or name another with --field")
    if count == 0:
        raise UserError(f"{path}: has no column {field!r}, only {', '.join(names)}; name one with --field")
    return names.index(field)


def _document(part: SourcePart, number: int, text: str | None, on_empty: OnEmpty) -> Iterator[Document]:
    name = f"{part.name}:{number}"
    if text:
        # JSON can hold lone surrogates, which UTF-8 cannot.
        yield Document(name, text_chunks(text.encode("utf-8", errors="replace")))
    else:
        on_empty(name)


def check_column(path: str | Path, schema: Any, field: str) -> int:
    """Returns the number of the column `field` of a pyarrow schema, which is known to hold text.

    Raises:
      UserError: no such column, several, or one that holds something else.
    """
    import pyarrow

    column = _column_of(path, schema.names, field)
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(kind) for check in (*is_text, pyarrow.types.is_null)):
        raise UserError(f"{path}: column {field!r} holds {kind}, not strings")
    return column


def open_parquet(path: str | Path, field: str) -> Any:
    """Returns the `pyarrow.parquet.ParquetFile`, whose column `field` is known to hold text.

    Raises:
      UserError: no parquet file, or no such column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(open_unpacked(path, None))
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path}: is no parquet file ({first_line(error)})") from error
    check_column(path, file.schema_arrow, field)
    return file


def _read_parquet(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    with open_parquet(part.path, part.field) as file:
        batches = file.iter_batches(_ROWS, row_groups=range(part.begin, part.end), columns=[part.field])
        yield from _rows(part, (batch.column(0) for batch in batches), on_empty)


def _read_arrow(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    with open_unpacked(part.path, None) as file:
        reader = _open_arrow(part.path, file)
        column = check_column(part.path, reader.schema, part.field)
        indexed = hasattr(reader, "get_batch")  # files; streams are iterated
        batches = map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader
        yield from _rows(part, (batch.column(column) for batch in batches), on_empty)


def _open_arrow(path: str, file: Any) -> Any:
    """Returns pyarrow's reader of an open Arrow IPC file, in the format of files or of streams."""
    import pyarrow

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    try:
        return pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path}: is no Arrow file that can be read ({first_line(error)})") from error


def _rows(part: SourcePart, columns: Iterable[Any], on_empty: OnEmpty) -> Iterator[Document]:
    """Yields the documents of the rows in pieces of one column."""
    import pyarrow

    number = part.first
    try:
        for column in columns:
            column.validate(full=True)  # or offsets of a damaged file lead out of its memory
            for begin in range(0, len(column), _ROWS):
                texts = column.slice(begin, _ROWS).to_pylist()
                for offset, text in enumerate(texts):
                    yield from _document(part, number + offset, text, on_empty)
                number += len(texts)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{part.path}, near row {number}: cannot be read ({first_line(error)})") from error


@functools.lru_cache(maxsize=8)
def _tfds_source(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split=split)


def _read_tfds(part: SourcePart, on_empty: OnEmpty) -> Iterator[Document]:
    source = _tfds_source(part.path, part.name)
    for number in range(part.begin, part.end):
        text = source[number][part.field]
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        name = f"{part.name}/{number}"
        if raw:
            yield Document(name, text_chunks(raw))
        else:
            on_empty(name)


_READERS = {
    "text": _read_text,
    "jsonl": _read_lines,
    "json": _read_items,
    "csv": _read_table,
    "tsv": _read_table,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "tfds": _read_tfds,
}
