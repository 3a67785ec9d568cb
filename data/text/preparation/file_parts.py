"""The parts of files that tasks read: which file is read how, and where long ones are divided.

Easy to get wrong: where a file is divided follows from the file and the size of a part alone.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.text.preparation.documents import SourcePart, open_parquet
from recollect.data.text.preparation.formats import Readable, Refusal, recognise
from recollect.data.text.preparation.listing import LeftOut, ListedFile, Listing
from recollect.data.tokenizers.text_chunks import CHUNK_BYTES, character_border, file_chunks


@dataclasses.dataclass(frozen=True)
class ReadFile:
    """A file (of TFDS, a split) that is read: its name, its bytes, and its role ("train", "validation" or "test")."""

    name: str
    size: int
    role: str


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a source, what they are of, and what is left out."""

    parts: Sequence[SourcePart]
    read: Sequence[ReadFile]
    left_out: Sequence[LeftOut]


def parts_of_files(listing: Listing, field: str, step: int, encoding: str | None) -> Parts:
    """Returns the parts of listed files, after opening each of them.

    Args:
      listing: the files.
      field: key or column of the text.
      step: bytes per part, about.
      encoding: of text files that are not UTF-8.

    Raises:
      UserError: a file that can't be read, or is not what its name says.
    """
    parts: list[SourcePart] = []
    read, left_out = [], list(listing.left_out)
    for file in listing.files:
        found = file.found
        if found.problem:
            left_out.append(LeftOut(found.name, 0, found.problem))
            continue
        readable = recognise(found.path, field, encoding)
        if isinstance(readable, Refusal):
            left_out.append(LeftOut(found.name, found.size, readable.reason, readable.detail, readable.lost))
            continue
        read.append(ReadFile(found.name, found.size, file.role))
        try:
            parts += _file_parts(file, readable, field, step)
        except OSError as error:
            raise UserError(f"{found.path}: cannot be read ({first_line(error)})") from error
    return Parts(parts, read, left_out)


def _file_parts(file: ListedFile, readable: Readable, field: str, step: int) -> Iterator[SourcePart]:
    path, name, size = file.found.path, file.found.name, file.found.size
    kind, codec, encoding, begin = readable.kind, readable.codec, readable.encoding, readable.begin
    if kind == "parquet":
        yield from _parquet_parts(path, name, field, step, file.split)
    elif codec or encoding or kind not in ("text", "jsonl") or size <= step:
        end = 0 if codec or encoding else size
        yield SourcePart(kind, str(path), name, begin, end, size, 1, field, file.split, codec=codec, encoding=encoding)
    elif kind == "jsonl":
        first = 1
        for start, end in _ranges(path, begin, size, step, lines_only=True):
            yield SourcePart(kind, str(path), name, start, end, end - start, first, field, file.split)
            first += sum(chunk.count(b"\n") for chunk in file_chunks(path, start, end))
    else:
        yield from text_parts(path, name, begin, size, step, file.split)


def text_parts(
    path: Path, name: str, begin: int, end: int, step: int, split: str | None = None
) -> Iterator[SourcePart]:
    """Yields the parts, several if it is long, of one document of a text file."""
    for start, stop in _ranges(path, begin, end, step, lines_only=False):
        yield SourcePart("text", str(path), name, start, stop, stop - start, split=split, continues=start > begin)


def _ranges(path: Path, begin: int, end: int, step: int, *, lines_only: bool) -> Iterator[tuple[int, int]]:
    """Yields ranges of about `step` bytes of a file that end where a line does, or a character in one without lines."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        while begin < end:
            mark = min(begin + step, end)
            stop = view.find(b"\n", mark - 1, end if lines_only else min(mark + CHUNK_BYTES, end)) + 1
            if mark == end or (stop == 0 and lines_only):
                stop = end
            elif stop == 0:
                stop = begin + character_border(view[begin:mark], mark - begin)
            yield begin, stop
            begin = stop


def _parquet_parts(path: Path, name: str, field: str, step: int, split: str | None) -> Iterator[SourcePart]:
    with open_parquet(path, field) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    begin, first, size, rows = 0, 1, 0, 0
    for number, group in enumerate(groups, start=1):
        size, rows = size + group.total_byte_size, rows + group.num_rows
        if size >= step or number == len(groups):
            yield SourcePart("parquet", str(path), name, begin, number, size, first, field, split)
            begin, first, size, rows = number, first + rows, 0, 0
