"""Sources of text, and how the work on one is divided into tasks.

    source = open_source("stdlib")           # or a file, a folder, "tfds:NAME", "tfds:NAME/CONFIG", "tfds:FOLDER"
    source.division.tasks                    # of each, the parts to read, which any process can (see documents.py)

"stdlib" is the source code of the running interpreter's standard library: some 11 MB of text that every machine has.
Its bytes differ between Python versions, and where a distribution has patched the library.

Where files are named train, validation or test, or a card says so, these splits are kept (listing.py). Otherwise a
twentieth of the documents is held out, chosen by a hash of the document's name, so adding files moves no other file
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
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.io import file_sha256
from recollect.data.text.preparation.documents import SourcePart, read_documents
from recollect.data.text.preparation.file_parts import Parts, ReadFile, parts_of_files, text_parts
from recollect.data.text.preparation.file_tree import is_hidden
from recollect.data.text.preparation.formats import NOT_UTF8
from recollect.data.text.preparation.listing import HELD_OUT_SHARE, LeftOut, Listing, Selection, list_files
from recollect.data.text.preparation.streams import check_encoding
from recollect.data.text.preparation.summary import described
from recollect.data.tokenizers.text_chunks import character_border

SMALLEST_SHARD = 1 << 22
MOST_SHARDS = 512
HASHED_BYTES = 1 << 28
"""Sources up to this size are fingerprinted by their bytes, larger ones by sizes and modification times of files."""

_FEW = 1000


@dataclasses.dataclass(frozen=True)
class Division:
    """The work on a source.

    Attributes:
      tasks: parts of the source that one task reads, for each task, in the order of the documents.
      size: bytes in all, about.
      held_out_bound: documents whose `rank` is at most this are held out (unless their part has a split).
      read, left_out: files that are read, and those that are not.
    """

    tasks: tuple[tuple[SourcePart, ...], ...]
    size: int
    held_out_bound: float
    read: Sequence[ReadFile]
    left_out: Sequence[LeftOut]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of text.

    Attributes:
      name: as the user wrote it.
      fingerprint: sha256, hexadecimal, which changes when the text does.
      list_parts: lists its parts.
      shard_bytes: text per task, about; None for the default.
      share: of the documents to hold out, where parts don't say it.
      folders: below which all files belong to it.
    """

    name: str
    fingerprint: str
    list_parts: Callable[[], Parts]
    shard_bytes: int | None
    share: float
    folders: tuple[Path, ...] = ()

    def has(self, path: Path) -> bool:
        """Returns whether files in the folder `path` would be text of this source."""
        real = Path(os.path.realpath(path))
        for folder in (Path(os.path.realpath(folder)) for folder in self.folders):
            if real.is_relative_to(folder) and not any(map(is_hidden, real.relative_to(folder).parts)):
                return True
        return False

    @functools.cached_property
    def division(self) -> Division:
        """How the work is divided. Computed when asked for, as that may read the whole source.

        Raises:
          UserError: there is no text in it, or a file can't be read.
        """
        listed = self.list_parts()
        try:
            parts, bound = _hold_out(self.name, list(listed.parts), self.share)
        except NoText as error:
            looked_for = "UTF-8 text" if any(one.reason == NOT_UTF8 for one in listed.left_out) else "text"
            left_out = f"; left out: {described(listed.left_out)}" if listed.left_out else ""
            ids = any(one.name.endswith((".bin", ".npy")) for one in listed.left_out)
            hint = "; if these are token ids, give the file itself, or name it train.bin or train.npy" if ids else ""
            raise UserError(f"source={self.name!r}: there is no {looked_for} in it{left_out}{hint}") from error
        size = sum(part.size for part in parts)
        tasks = _group(parts, _task_bytes(size, self.shard_bytes))
        return Division(tasks, size, bound, listed.read, listed.left_out)


class NoText(Exception):
    """A source has no text."""


def rank(name: str) -> float:
    """Returns a number from 0 to 1 that is a hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little") / 2**64


def split_of(part: SourcePart, name: str, held_out_bound: float) -> str:
    """Returns the split, "train" or "held_out", of the document `name` of a part."""
    return part.split or ("held_out" if rank(name) <= held_out_bound else "train")


def open_source(
    name: str, field: str = "text", shard_bytes: int | None = None, selection: Selection = Selection()
) -> Source:
    """Returns the source called `name`.

    Args:
      name: "stdlib", "tfds:NAME", or the path of a file or of a folder of files; formats.py has their formats.
      field: key of JSON objects, column of tables, feature of a TFDS data set that holds the text.
      shard_bytes: text per task, about; None: 4 MiB, more where that made over 512 tasks.
      selection: what of it is read, and as what.

    Raises:
      UserError: no such source, nothing in it, or a file that can't be read.
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: must be positive")
    if selection.encoding is not None:
        check_encoding(selection.encoding)
    if name.startswith("tfds:"):
        from recollect.data.text.preparation.tfds_sources import tfds_parts

        found, fingerprint = tfds_parts(name, field, lambda size: _task_bytes(size, shard_bytes), selection)
        return Source(name, fingerprint, lambda: found, shard_bytes, selection.share or HELD_OUT_SHARE)
    listing = list_files(name, selection)

    step = _task_bytes(sum(file.found.size for file in listing.files), shard_bytes)

    def parts() -> Parts:
        return parts_of_files(listing, field, step, selection.encoding)

    return Source(name, _fingerprint(listing), parts, shard_bytes, listing.share, listing.folders)


def _task_bytes(size: int, shard_bytes: int | None) -> int:
    return shard_bytes or max(SMALLEST_SHARD, -(-size // MOST_SHARDS))


def _fingerprint(listing: Listing) -> str:
    """Returns the sha256 of names, splits and bytes of files; of a large source, sizes and modification times."""
    by_bytes = sum(file.found.size for file in listing.files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in listing.files:
        found = file.found
        try:
            content = file_sha256(found.path) if by_bytes else found.modified
        except OSError as error:
            raise UserError(f"{found.path}: cannot be read ({error.strerror})") from error
        digest.update(json.dumps([found.name, found.size, content, file.split]).encode("utf-8"))
    return digest.hexdigest()


def _hold_out(source: str, parts: list[SourcePart], share: float) -> tuple[list[SourcePart], float]:
    """Returns the parts, and the rank up to which documents are held out, chosen so that neither split is empty.

    Raises:
      NoText: there is no document.
      UserError: a single one that can't be divided.
    """
    if parts and all(part.split for part in parts):
        return parts, share
    documents = (
        (part, document.name)
        for part in parts
        if not part.continues
        for document in itertools.islice(read_documents(part), _FEW)
    )
    first = list(itertools.islice(documents, _FEW))
    if len(first) == _FEW:  # the odds that none of 1,000 is held out are 1 to 10^22
        return parts, share
    if not first:
        raise NoText
    if len(first) == 1:
        part, name = first[0]
        if part.kind != "text":
            raise UserError(f"source={source!r}: has one document; to hold one out it must have two, or be a text file")
        return _divide_text(part, [other for other in parts if other.name == name], share), share
    ranks = sorted(rank(name) for _, name in first)
    # At least one document in each split, however few there are.
    return parts, min(max(share, ranks[0]), ranks[-2])


def _divide_text(part: SourcePart, parts: Sequence[SourcePart], share: float) -> list[SourcePart]:
    """Returns the parts of a text file with its end held out."""
    path, begin = Path(part.path), part.begin
    if part.streamed:
        size, cut = _cut_of_stream(part, share)
    else:
        size = parts[-1].end
        mark = begin + int((size - begin) * (1 - share))
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            # A line break at or before the mark; else any byte that begins a character.
            starts = (at for at in range(mark, begin, -1) if view[at] & 0xC0 != 0x80)
            cut = view.rfind(b"\n", begin, mark) + 1 or next(starts, begin)
    if cut <= begin:
        raise UserError(f"{path.name}: {size} bytes are too few to hold a part out")
    train, held_out = part.name + ":train", part.name + ":held_out"
    if part.streamed:
        ends = (
            dataclasses.replace(part, name=train, end=cut, split="train"),
            dataclasses.replace(part, name=held_out, begin=cut, split="held_out"),
        )
        return list(ends)
    step = max(part.end - part.begin for part in parts)
    return [
        *text_parts(path, train, begin, cut, step, "train"),
        *text_parts(path, held_out, cut, size, step, "held_out"),
    ]


def _cut_of_stream(part: SourcePart, share: float) -> tuple[int, int]:
    """Returns the bytes of a packed or transcoded text, and where its held-out end begins: after a line, if it can."""
    size = sum(len(chunk) for document in read_documents(part) for chunk in document.chunks)
    mark, at, line, character = int(size * (1 - share)), 0, 0, 0
    for document in read_documents(part):
        for chunk in document.chunks:
            before = chunk[: max(mark - at, 0)]
            line = at + before.rfind(b"\n") + 1 if b"\n" in before else line
            if at <= mark < at + len(chunk):
                character = at + (character_border(chunk, mark - at) if mark > at else 0)
            at += len(chunk)
    return size, line or character


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
