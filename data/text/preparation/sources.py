"""Sources of text, and how the work on one is divided into tasks.

    source = open_source("stdlib")           # or a file, a folder, "tfds:NAME", "tfds:NAME/CONFIG", "tfds:FOLDER"
    for parts in source.division.tasks: ...  # tuples of parts that any process can read (data/text/preparation/formats.py)

"stdlib" is the source code of the running interpreter's standard library: some 11 MB of text that every machine has.
Its bytes differ between Python versions.

A twentieth of the documents is held out, chosen by a hash of the document's name, so adding files moves no other file
from one split to the other. A single text file is divided at a line break instead: its last twentieth is held out. Of a
TFDS data set with a validation or test split, that split is held out.

Easy to get wrong: tasks must not depend on which process works on them, so they follow from the source and
`shard_bytes` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import file_sha256
from recollect.data.text.preparation.formats import SourcePart, kind_of, open_parquet, read_documents
from recollect.data.tokenizers.text_chunks import CHUNK_BYTES, character_border, file_chunks, is_utf8

HELD_OUT_SHARE = 0.05
SMALLEST_SHARD = 1 << 22
MOST_SHARDS = 512
HASHED_BYTES = 1 << 28
"""Sources up to this size are fingerprinted by their bytes, larger ones by sizes and modification times of files."""

_FEW = 1000
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Division:
    """The work on a source.

    Attributes:
      tasks: parts of the source that one task reads, for each task, in the order of the documents.
      size: bytes in all, about.
      held_out_bound: documents whose `rank` is at most this are held out (unless their part has a split).
    """

    tasks: tuple[tuple[SourcePart, ...], ...]
    size: int
    held_out_bound: float


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of text.

    Attributes:
      name: as the user wrote it.
      fingerprint: sha256, hexadecimal, which changes when the text does.
      parts: lists its parts.
      shard_bytes: text per task, about; None for the default.
      root: the folder below which all files belong to it; None when there is none.
    """

    name: str
    fingerprint: str
    parts: Callable[[], list[SourcePart]]
    shard_bytes: int | None
    root: Path | None = None

    def has(self, path: Path) -> bool:
        """Returns whether files in the folder `path` would be text of this source."""
        if self.root is None or not path.resolve().is_relative_to(self.root.resolve()):
            return False
        return not _is_hidden(path.resolve().relative_to(self.root.resolve()))

    @functools.cached_property
    def division(self) -> Division:
        """How the work is divided. Computed when asked for, as that may read the whole source.

        Raises:
          UserError: there is no text in it, or a file can't be read.
        """
        parts, bound = _hold_out(self.name, self.parts())
        size = sum(part.size for part in parts)
        return Division(_group(parts, _task_bytes(size, self.shard_bytes)), size, bound)


def rank(name: str) -> float:
    """Returns a number from 0 to 1 that is a hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little") / 2**64


def split_of(part: SourcePart, name: str, held_out_bound: float) -> str:
    """Returns the split, "train" or "held_out", of the document `name` of a part."""
    return part.split or ("held_out" if rank(name) <= held_out_bound else "train")


def open_source(name: str, field: str = "text", shard_bytes: int | None = None) -> Source:
    """Returns the source called `name`.

    Args:
      name: "stdlib", "tfds:NAME", or the path of a text file, a .jsonl, .jsonl.gz or .parquet file, or a folder of
        files.
      field: key of .jsonl objects, column of .parquet files, feature of a TFDS data set that holds the text.
      shard_bytes: text per task, about; None: 4 MiB, more where that made over 512 tasks.

    Raises:
      UserError: no such source, nothing in it, or a file that can't be read.
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: must be positive")
    if name.startswith("tfds:"):
        from recollect.data.text.preparation.tfds_sources import tfds_parts

        parts, fingerprint = tfds_parts(name, field, lambda size: _task_bytes(size, shard_bytes))
        return Source(name, fingerprint, lambda: parts, shard_bytes)
    root, files = _files(name)
    if not files:
        raise UserError(f"source={name!r}: there is no text in it")
    step = _task_bytes(sum(path.stat().st_size for path in files), shard_bytes)

    def file_parts() -> list[SourcePart]:
        return [part for path in files for part in _file_parts(path, path.relative_to(root).as_posix(), field, step)]

    folder = root if root == Path(name).expanduser() else None
    return Source(name, _fingerprint(root, files), file_parts, shard_bytes, folder)


def _task_bytes(size: int, shard_bytes: int | None) -> int:
    return shard_bytes or max(SMALLEST_SHARD, -(-size // MOST_SHARDS))


def _files(name: str) -> tuple[Path, list[Path]]:
    """Returns a root, and files below it in the order of their names from there, without hidden ones."""
    root = Path(sysconfig.get_path("stdlib")) if name == "stdlib" else Path(name).expanduser()
    if root.is_file():
        return root.parent, [root]
    if name == "stdlib":
        files = [path for path in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    elif root.is_dir():
        files = [path for path in root.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(root))]
    else:
        raise UserError(f"source={name!r}: no such file or folder; a source is stdlib, a path, or tfds:NAME")
    return root, sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _fingerprint(root: Path, files: Sequence[Path]) -> str:
    """Returns the sha256 of names and bytes of files, or of names, sizes and modification times of a large source."""
    states = [path.stat() for path in files]
    by_bytes = sum(state.st_size for state in states) <= HASHED_BYTES
    digest = hashlib.sha256()
    for path, state in zip(files, states, strict=True):
        content = file_sha256(path) if by_bytes else state.st_mtime_ns
        digest.update(json.dumps([path.relative_to(root).as_posix(), state.st_size, content]).encode("utf-8"))
    return digest.hexdigest()


def _file_parts(path: Path, name: str, field: str, step: int) -> Iterator[SourcePart]:
    size = path.stat().st_size
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet_parts(path, name, field, step)
    elif kind == "gzip" or 0 < size <= step:
        yield SourcePart(kind, str(path), name, 0, size, size, field=field)
    elif kind == "jsonl" and size:
        first = 1
        for begin, end in _ranges(path, 0, size, step, lines_only=True):
            yield SourcePart(kind, str(path), name, begin, end, end - begin, first, field)
            first += sum(chunk.count(b"\n") for chunk in file_chunks(path, begin, end))
    elif size and is_utf8(path, 0, size):
        yield from _text_parts(path, name, 0, size, step)


def _text_parts(
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


def _parquet_parts(path: Path, name: str, field: str, step: int) -> Iterator[SourcePart]:
    with open_parquet(path, field) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    begin, first, size, rows = 0, 1, 0, 0
    for number, group in enumerate(groups, start=1):
        size, rows = size + group.total_byte_size, rows + group.num_rows
        if size >= step or number == len(groups):
            yield SourcePart("parquet", str(path), name, begin, number, size, first, field)
            begin, first, size, rows = number, first + rows, 0, 0


def _hold_out(source: str, parts: list[SourcePart]) -> tuple[list[SourcePart], float]:
    """Returns the parts, and the rank up to which documents are held out, chosen so that neither split is empty.

    Raises:
      UserError: no document, or a single one that can't be divided.
    """
    if parts and all(part.split for part in parts):
        return parts, HELD_OUT_SHARE
    documents = (
        (part, document.name)
        for part in parts
        if not part.continues
        for document in itertools.islice(read_documents(part), _FEW)
    )
    first = list(itertools.islice(documents, _FEW))
    if len(first) == _FEW:  # the odds that none of 1,000 is held out are 1 to 10^22
        return parts, HELD_OUT_SHARE
    if not first:
        raise UserError(f"source={source!r}: there is no UTF-8 text in it")
    if len(first) == 1:
        part, name = first[0]
        if part.kind != "text":
            raise UserError(f"source={source!r}: has one document; to hold one out it must have two, or be a text file")
        return _divide_text(part, [other for other in parts if other.name == name]), HELD_OUT_SHARE
    ranks = sorted(rank(name) for _, name in first)
    # At least one document in each split, however few there are.
    return parts, min(max(HELD_OUT_SHARE, ranks[0]), ranks[-2])


def _divide_text(part: SourcePart, parts: Sequence[SourcePart]) -> list[SourcePart]:
    """Returns the parts of a text file with its end held out."""
    path, size = Path(part.path), parts[-1].end
    mark = int(size * (1 - HELD_OUT_SHARE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        # A line break at or before the mark; else any byte that begins a character.
        cut = view.rfind(b"\n", 0, mark) + 1 or next((at for at in range(mark, 0, -1) if view[at] & 0xC0 != 0x80), 0)
    if cut == 0:
        raise UserError(f"{path.name}: {size} bytes are too few to hold a part out")
    step = max(part.end - part.begin for part in parts)
    train = _text_parts(path, part.name + ":train", 0, cut, step, "train")
    return [*train, *_text_parts(path, part.name + ":held_out", cut, size, step, "held_out")]


def _group(parts: list[SourcePart], task_bytes: int) -> tuple[tuple[SourcePart, ...], ...]:
    """Returns neighbouring parts together, at least `task_bytes` in each group but the last."""
    groups: list[list[SourcePart]] = [[]]
    size = 0
    for part in parts:
        if size >= task_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    return tuple(map(tuple, groups))
