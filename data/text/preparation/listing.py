"""Which files a source has, and which split each is of, by their names: what can be said before any is opened.

listing = list_files("my_texts/", Selection(held_out="0.1"))
listing.files[0].found.name, listing.files[0].split
listing.left_out[0].reason
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.machine import expanded
from recollect.configuration.read_json import read_json_object
from recollect.configuration.user_paths import path_kind
from recollect.data.text.preparation.file_tree import FoundFile, files_below, found_file
from recollect.data.text.preparation.formats import refusal_by_name
from recollect.data.text.preparation.splits import CARD, WORDS, split_by_name, splits_of_card

HELD_OUT_SHARE = 0.05
STATE = "state.json"
Splits = dict[FoundFile, str | None]
"""Files, and the split that names or a card say of each."""
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})
_BUILT = re.compile(r"_sysconfigdata.*\.py|config-[^/]*/.*|(site|user)customize\.py")
"""Files of the standard library that a build writes, with its own paths and flags, or that an installation adds: with
them two machines with one version of Python would have two corpora."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a source is read, and as what.

    Attributes:
      include: patterns of file names that are read though they have to be asked for (.csv, .py, ...).
      exclude: patterns of file names that are left out.
      encoding: of text files that are not UTF-8; None leaves them out.
      held_out: a share of the documents ("0.1"), a split by its name, or a file or folder; None: the validation split,
        else the test split, else a twentieth of the documents.
      config: which configuration of a data set's card.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    encoding: str | None = None
    held_out: str | None = None
    config: str | None = None

    @property
    def share(self) -> float | None:
        """The share that `held_out` asks for; None where it asks for something else.

        Raises:
          UserError: a number that is no share.
        """
        try:
            share = float(self.held_out or "none")
        except ValueError:
            return None
        if not 0 < share < 1:
            raise UserError(f"held_out={self.held_out}: a share must be above 0 and below 1")
        return share


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Something that is not read: how much, why, and whether text may be lost with it."""

    name: str
    size: int
    reason: str
    detail: str = ""
    lost: bool = True


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """A file to read.

    Attributes:
      found: the file.
      role: "train", "validation" or "test", as the summary calls it.
      split: "train" or "held_out"; None where the names of its documents decide.
    """

    found: FoundFile
    role: str
    split: str | None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
      folders: below which all files belong to it; none of single files.
      files: to be read, in the order of their names.
      left_out: not to be read.
      share: of the documents to hold out, where files don't say it.
    """

    folders: tuple[Path, ...]
    files: Sequence[ListedFile]
    left_out: Sequence[LeftOut]
    share: float


def list_files(source: str, selection: Selection) -> Listing:
    """Returns the files of a source that is "stdlib", a file or a folder.

    Raises:
      UserError: no such source, one that can't be looked at, or splits without files.
    """
    said = f"source={source!r}"
    share = selection.share
    if source == "stdlib":
        if selection != Selection(held_out=selection.held_out) or (selection.held_out and share is None):
            raise UserError(f"{said}: of the options about files, it takes --held-out SHARE alone")
        return Listing((), _standard_library(), (), share or HELD_OUT_SHARE)
    root = expanded(source, said)
    kind = path_kind(root, said)
    if kind not in ("file", "folder"):
        raise UserError(f"{said}: no such file or folder; a source is stdlib, a path, or tfds:NAME")
    folders: tuple[Path, ...] = (root,) if kind == "folder" else ()
    if kind == "folder":
        splits, left_out = _files_of_folder(root, selection)
    else:
        splits, left_out = {found_file(root, root.name): None}, []
    held: Splits = {}
    if selection.held_out is None:
        held = _of_split(splits, "validation") or _of_split(splits, "test")
    elif share is None:
        held, more = _held_out(selection, splits, left_out)
        folders += more
    files = [ListedFile(file, split or "validation", "held_out") for file, split in held.items()]
    for file, split in splits.items():
        if file in held:
            continue
        if split in (None, "train"):
            files.append(ListedFile(file, "train", "train" if held else None))
        else:
            left_out.append(LeftOut(file.name, file.size, f"the {split} split", f"--held-out {split} takes it", False))
    if files and not any(file.role == "train" for file in files):
        raise UserError(f"{said}: has no files to train on; all are held out, by their names or by --held-out")
    return Listing(folders, sorted(files, key=lambda file: file.found.name), left_out, share or HELD_OUT_SHARE)


def _of_split(splits: Splits, split: str) -> Splits:
    return {file: said for file, said in splits.items() if said == split}


def _held_out(selection: Selection, splits: Splits, left_out: list[LeftOut]) -> tuple[Splits, tuple[Path, ...]]:
    """Returns the files that `selection.held_out` names, and the folder that it names, if it does.

    Files that are none of the source are put under the name of what was named.
    """
    name = selection.held_out or ""
    said = f"held_out={name!r}"
    # A split of the source comes before a path of the same name; ./test is always a path.
    chosen = _of_split(splits, next((split for split, words in WORDS.items() if name.lower() in words), name))
    if chosen:
        return chosen, ()
    path = expanded(name, said)
    kind = path_kind(path, said)
    if kind is None:
        others = ", ".join(sorted({split for split in splits.values() if split})) or "none"
        raise UserError(f"{said}: is no share, no path, and no split of the source, which names {others}")
    ours = {os.path.realpath(file.path): file for file in splits}
    theirs, more = ({found_file(path, ""): None}, []) if kind == "file" else _files_of_folder(path, selection)
    held: Splits = {}
    for file in theirs:
        same = ours.get(os.path.realpath(file.path))
        if same is None:
            same = dataclasses.replace(file, name=f"{path.name}/{file.name}".rstrip("/"))
        held[same] = "validation"
    if not held:
        raise UserError(f"{said}: has no text in it")
    left_out += [dataclasses.replace(other, name=f"{path.name}/{other.name}") for other in more]
    return held, (path,) if kind == "folder" else ()


def _files_of_folder(root: Path, selection: Selection) -> tuple[Splits, list[LeftOut]]:
    """Returns the files to read below a folder, with the splits that their names or a card say, and those left out."""
    found = files_below(root, lambda name: _matches(name, selection.exclude))
    for pattern in selection.include:
        if not any(_matches(file.name, (pattern,)) for file in found):
            raise UserError(f"include={pattern!r}: matches no file in {root}")
    listed = None if _matches(CARD, selection.exclude) else splits_of_card(root, selection.config)
    stale = set(_stale_arrow_files(found))
    splits: Splits = {}
    left_out = []
    for file in found:
        in_card = listed is not None and file.path in listed
        asked = in_card or _matches(file.name, selection.include)
        refusal = None if asked else refusal_by_name(file.path)
        if file.problem:
            left_out.append(LeftOut(file.name, 0, file.problem))
        elif refusal:
            left_out.append(LeftOut(file.name, file.size, refusal.reason, refusal.detail, refusal.lost))
        elif file in stale and not asked:
            left_out.append(LeftOut(file.name, file.size, f"not listed by the {STATE} beside it", lost=False))
        elif listed is not None and not asked:
            left_out.append(LeftOut(file.name, file.size, f"not listed by {CARD}", lost=False))
        else:
            splits[file] = listed[file.path] if listed is not None and in_card else split_by_name(file.name)
    return splits, left_out


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a path, or its last part, matches one of the patterns."""
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.split("/")[-1]) for pattern in patterns)


def _stale_arrow_files(found: Sequence[FoundFile]) -> Iterator[FoundFile]:
    """Yields the .arrow files of `save_to_disk` folders that hold caches and not the data set.

    Raises:
      UserError: one that holds the data set is missing.
    """
    by_folder: dict[Path, dict[str, FoundFile]] = {}
    for file in found:
        by_folder.setdefault(file.path.parent, {})[file.path.name] = file
    for folder, files in by_folder.items():
        state = read_json_object(folder / STATE) if STATE in files else {}
        entries = state.get("_data_files")
        if not isinstance(entries, list):
            continue
        names = {str(entry.get("filename")) for entry in entries if isinstance(entry, dict)}
        if missing := sorted(names - files.keys()):
            raise UserError(f"{folder / STATE}: lists {missing[0]}, which is not there")
        yield from (file for name, file in files.items() if name.endswith(".arrow") and name not in names)


def _standard_library() -> list[ListedFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
    names = [(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    files = [found_file(path, name) for path, name in names if not _BUILT.fullmatch(name)]
    return [ListedFile(file, "train", None) for file in sorted(files, key=lambda file: file.name)]
