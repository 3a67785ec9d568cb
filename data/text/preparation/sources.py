"""What text can be had from, and how the work on it is shared out.

    source = open_source("stdlib")           # or a file, a folder, "tfds:NAME", "tfds:NAME/CONFIG", "tfds:FOLDER"
    for task in source.division.tasks: ...            # each a tuple of units that any process can read (data/text/preparation/formats.py)

"stdlib" is the source code of the running interpreter's standard library: some 11 MB of text that every machine has.
Its bytes differ between Python versions.

A twentieth of the documents is held out, chosen by a hash of the document's name, so that adding files moves no other
file
from one side to the other. One text file is divided at a line break instead: its last twentieth is held out. A TFDS
data set that has a validation or test split has that held out.

Easy to get wrong: tasks must not depend on who works on them, so they follow from the source and `shard_bytes` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.data.text.preparation.formats import Unit, is_utf8, kind_of, open_parquet, read_unit
from recollect.data.text.preparation.text_chunks import STRETCH, character_border

HELD_OUT_SHARE = 0.05
SMALLEST_SHARD = 1 << 22
MOST_SHARDS = 512
HASHED_BYTES = 1 << 28
"""Sources up to this size are known by their bytes, larger ones by their files' sizes and times of change."""

_FEW = 1000
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Division:
    """The work on a source.

    Attributes:
      tasks: what can be done apart, in the order of the documents.
      size: bytes in all, about.
      held_out_bound: documents whose hash is at most this are held out (unless their unit has a split).
    """

    tasks: tuple[tuple[Unit, ...], ...]
    size: int
    held_out_bound: float

    def split_of(self, unit: Unit, name: str) -> str:
        """ "train" or "held_out", for a document of a unit."""
        return unit.split or ("held_out" if rank(name) <= self.held_out_bound else "train")


class Source:
    """Where text comes from.

    Attributes:
      name: as the user wrote it.
      fingerprint: sha256, hexadecimal, which changes when the text does.
      root: the folder below which all files are text of it; None when there is none.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        units: Callable[[], list[Unit]],
        shard_bytes: int | None,
        root: Path | None = None,
    ):
        self.name = name
        self.fingerprint = fingerprint
        self.root = root
        self._units = units
        self._shard_bytes = shard_bytes

    def has(self, path: Path) -> bool:
        """Whether files in the folder `path` would be text of this source."""
        if self.root is None or not path.resolve().is_relative_to(self.root.resolve()):
            return False
        return not _is_left_out(path.resolve().relative_to(self.root.resolve()))

    @functools.cached_property
    def division(self) -> Division:
        """How the work is shared out. It is looked for when asked, as that may read the whole source.

        Raises:
          UserError: there is no text in it, or a file can't be read.
        """
        units, bound = _divide(self.name, self._units())
        size = sum(unit.size for unit in units)
        return Division(_share_out(units, _step(size, self._shard_bytes)), size, bound)


def rank(name: str) -> float:
    """A number from 0 to 1 that a name always has."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little") / 2**64


def open_source(name: str, field: str = "text", shard_bytes: int | None = None) -> Source:
    """The source called `name`.

    Args:
      name: "stdlib", "tfds:NAME", or the path of a text file, a .jsonl, .jsonl.gz or .parquet file, or a folder of
        files.
      field: key of .jsonl objects, column of .parquet files, feature of a TFDS data set that holds the text.
      shard_bytes: text of a task, about; None: 4 MiB, more where that made over 512 tasks.

    Raises:
      UserError: no such source, nothing in it, or a file that can't be read.
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: must be positive")
    if name.startswith("tfds:"):
        from recollect.data.text.preparation.tfds_sources import tfds_units

        units, fingerprint = tfds_units(name, field, lambda size: _step(size, shard_bytes))
        return Source(name, fingerprint, lambda: units, shard_bytes)
    root, files = _standard_library() if name == "stdlib" else _local_files(Path(name).expanduser())
    if not files:
        raise UserError(f"source={name!r}: there is no text in it")
    step = _step(sum(path.stat().st_size for path in files), shard_bytes)

    def file_units() -> list[Unit]:
        return [unit for path in files for unit in _file_units(path, path.relative_to(root).as_posix(), field, step)]

    folder = root if name != "stdlib" and Path(name).expanduser().is_dir() else None
    return Source(name, _fingerprint(root, files), file_units, shard_bytes, folder)


def _step(size: int, wanted: int | None) -> int:
    return wanted or max(SMALLEST_SHARD, -(-size // MOST_SHARDS))


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    return root, sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _local_files(path: Path) -> tuple[Path, list[Path]]:
    """A root, and files below it in the order of their names from there; no hidden ones."""
    if path.is_dir():
        found = []
        for file in path.rglob("*"):
            if file.is_file() and not _is_left_out(file.relative_to(path)):
                found.append(file)
        return path, sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.is_file():
        raise UserError(f"source={str(path)!r}: no such file or folder; a source is stdlib, a path, or tfds:NAME")
    return path.parent, [path]


def _is_left_out(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _fingerprint(root: Path, files: Sequence[Path]) -> str:
    """sha256 over names and bytes of files, or over names, sizes and times of change when they are many bytes."""
    states = [path.stat() for path in files]
    by_bytes = sum(state.st_size for state in states) <= HASHED_BYTES
    digest = hashlib.sha256()
    for path, state in zip(files, states, strict=True):
        known: list[Any] = [path.relative_to(root).as_posix(), state.st_size]
        known.append(hashlib.sha256(path.read_bytes()).hexdigest() if by_bytes else state.st_mtime_ns)
        digest.update(json.dumps(known).encode("utf-8"))
    return digest.hexdigest()


def _file_units(path: Path, name: str, field: str, step: int) -> Iterator[Unit]:
    size = path.stat().st_size
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet_units(path, name, field, step)
    elif kind == "gzip" or 0 < size <= step:
        yield Unit(kind, str(path), name, 0, size, size, field=field)
    elif kind == "jsonl" and size:
        first = 1
        for begin, end in _ranges(path, 0, size, step, lines_only=True):
            yield Unit(kind, str(path), name, begin, end, end - begin, first, field)
            first += _count_lines(path, begin, end)
    elif size and is_utf8(path):
        yield from _text_units(path, name, 0, size, step)


def _text_units(path: Path, name: str, begin: int, end: int, step: int, split: str | None = None) -> Iterator[Unit]:
    """One document of a text file, in several units if it is long."""
    for start, stop in _ranges(path, begin, end, step, lines_only=False):
        yield Unit("text", str(path), name, start, stop, stop - start, split=split, continues=start > begin)


def _ranges(path: Path, begin: int, end: int, step: int, *, lines_only: bool) -> Iterator[tuple[int, int]]:
    """Parts of a file of about `step` bytes that end where a line does; or, in a text without lines, a character."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        while begin < end:
            mark = min(begin + step, end)
            stop = view.find(b"\n", mark - 1, end if lines_only else min(mark + STRETCH, end)) + 1
            if mark == end or (stop == 0 and lines_only):
                stop = end
            elif stop == 0:
                stop = begin + character_border(view[begin:mark], mark - begin)
            yield begin, stop
            begin = stop


def _count_lines(path: Path, begin: int, end: int) -> int:
    with open(path, "rb") as file:
        file.seek(begin)
        return sum(file.read(min(STRETCH, end - at)).count(b"\n") for at in range(begin, end, STRETCH))


def _parquet_units(path: Path, name: str, field: str, step: int) -> Iterator[Unit]:
    file = open_parquet(path, field)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    file.close()
    begin, first, size, rows = 0, 1, 0, 0
    for number, group in enumerate(groups, start=1):
        size, rows = size + group.total_byte_size, rows + group.num_rows
        if size >= step or number == len(groups):
            yield Unit("parquet", str(path), name, begin, number, size, first, field)
            begin, first, size, rows = number, first + rows, 0, 0


def _divide(source: str, units: list[Unit]) -> tuple[list[Unit], float]:
    """Units, and the hash up to which documents are held out, chosen so that neither side is empty.

    Raises:
      UserError: no document, or one that can't be divided.
    """
    if units and all(unit.split for unit in units):
        return units, HELD_OUT_SHARE
    found: list[tuple[Unit, str]] = []
    for unit in units:
        found += [
            (unit, document.name) for document in itertools.islice(read_unit(unit), _FEW) if not document.continues
        ]
        if len(found) >= _FEW:  # none of 1,000 is held out once in 10^22 times
            return units, HELD_OUT_SHARE
    if not found:
        raise UserError(f"source={source!r}: there is no UTF-8 text in it")
    if len(found) == 1:
        unit, name = found[0]
        if unit.kind != "text":
            raise UserError(f"source={source!r}: has one document; to hold one out it must have two, or be a text file")
        return _halves(unit, [other for other in units if other.name == name]), HELD_OUT_SHARE
    ranks = [rank(name) for _, name in found]
    # At least one on each side, however few there are.
    return units, min(max(HELD_OUT_SHARE, min(ranks)), sorted(ranks)[-2])


def _halves(unit: Unit, units: Sequence[Unit]) -> list[Unit]:
    """A text file's units with its end held out."""
    path, size = Path(unit.path), units[-1].end
    mark = int(size * (1 - HELD_OUT_SHARE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        # A line break at or before the mark; else any byte that begins a character.
        at = view.rfind(b"\n", 0, mark) + 1 or next(
            (place for place in range(mark, 0, -1) if view[place] & 0xC0 != 0x80), 0
        )
    if at == 0:
        raise UserError(f"{path.name}: {size} bytes are too few to hold a part out")
    step = max(part.end - part.begin for part in units)
    train = _text_units(path, unit.name + ":train", 0, at, step, "train")
    return [*train, *_text_units(path, unit.name + ":held_out", at, size, step, "held_out")]


def _share_out(units: Iterable[Unit], shard_bytes: int) -> tuple[tuple[Unit, ...], ...]:
    """Neighbouring units together until they have `shard_bytes`."""
    tasks: list[tuple[Unit, ...]] = []
    taken: list[Unit] = []
    size = 0
    for unit in units:
        taken.append(unit)
        size += unit.size
        if size >= shard_bytes:
            tasks.append(tuple(taken))
            taken, size = [], 0
    return (*tasks, *([tuple(taken)] if taken else ()))
