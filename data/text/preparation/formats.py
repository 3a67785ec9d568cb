"""The formats of text that are read: which one a file has, by its content and its name.

| kind | by content | by name | in a folder |
|---|---|---|---|
| text | UTF-8; UTF-16 and UTF-32 with a byte order mark | any other name | read |
| jsonl | JSON objects, one per line | .jsonl, .ndjson, .json, none | read |
| json | a JSON array of objects or strings; one object | .json, .jsonl | read |
| parquet | PAR1 | .parquet | read |
| arrow | ARROW1, or a stream | .arrow, .feather, .ipc | read |
| csv, tsv | | .csv, .tsv | when asked for |
| text | source code, markup, settings | .py, .html, .yaml, ... | when asked for |

Any of the texts may be packed with gzip, zstandard, bzip2 or xz. A file is asked for when it is the source itself, or
matches `include`. What no row reads is left out, with its reason; a file whose name promises a format that its content
is not ends the preparation.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import BinaryIO

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.text.preparation.json_items import json_items
from recollect.data.text.preparation.streams import (
    READ_ERRORS,
    codec_of,
    encoding_of,
    first_undecodable,
    open_unpacked,
    open_utf8,
    without_codec_suffix,
)

NOT_UTF8 = "not UTF-8"
_HEAD = 1 << 16
_LONGEST_LINE = 1 << 26

_BY_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    ".csv": "csv",
    ".tsv": "tsv",
}
_CODE_SUFFIXES = """
    .py .pyi .ipynb .c .h .cc .cpp .cxx .hpp .cu .java .js .jsx .mjs .ts .tsx .go .rs .rb .php .pl .pm .r .jl .lua .m
    .swift .kt .scala .hs .ml .clj .ex .erl .cs .vb .f90 .sql .sh .bash .zsh .ps1 .bat .cmake .mk
    .html .htm .xhtml .xml .svg .css .scss .yaml .yml .toml .ini .cfg .conf .lock .map .proto
"""
_CODE_NAMES = "makefile dockerfile cmakelists.txt requirements.txt"
_METADATA = """
    readme readme.md readme.txt readme.rst license license.txt license.md licence notice citation.cff use_policy.md
    dataset_info.json dataset_infos.json dataset_dict.json state.json croissant.json .gitattributes
"""
_LFS = b"version https://git-lfs.github.com/spec/"
_BINARY = {
    b"PK\x03\x04": "an archive, which has to be unpacked",
    b"7z\xbc\xaf\x27\x1c": "an archive, which has to be unpacked",
    b"Rar!": "an archive, which has to be unpacked",
    b"%PDF": "a PDF",
}


@dataclasses.dataclass(frozen=True)
class Readable:
    """How a file is read: see `recollect.data.text.preparation.documents.SourcePart` for `kind`, `codec` and
    `encoding`; `begin` is the first byte of its text."""

    kind: str
    codec: str | None = None
    encoding: str | None = None
    begin: int = 0


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a file is left out: the reason, what is special about this file, and whether text may be lost with it."""

    reason: str
    detail: str = ""
    lost: bool = True


def refusal_by_name(path: Path) -> Refusal | None:
    """Returns why a file that nobody asked for is left out unread; None where its content decides."""
    name = without_codec_suffix(path.name)[0]
    suffix = Path(name).suffix.lower()
    if name.lower() in _METADATA.split():
        return Refusal("metadata", lost=False)
    if suffix in (".csv", ".tsv"):
        return Refusal("tables, which have to be asked for", f"--include '*{suffix}' reads a column of them")
    if suffix in _CODE_SUFFIXES.split() or name.lower() in _CODE_NAMES.split():
        return Refusal("code, markup and settings, which have to be asked for", f"--include '*{suffix or name}'")
    return None


def recognise(path: Path, field: str, encoding: str | None = None) -> Readable | Refusal:
    """Returns how a file is read, or why it is not. Of a text file all is read for that.

    Args:
      path: the file.
      field: key of the text of JSON objects.
      encoding: of text files that are not UTF-8; None leaves these out.

    Raises:
      UserError: it cannot be read, is damaged, or is not what its name says.
    """
    name, promised = without_codec_suffix(path.name)
    kind = _BY_SUFFIX.get(Path(name).suffix.lower(), "text")
    try:
        return _recognise_content(path, kind, promised, field, encoding)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be {'unpacked' if promised else 'read'} ({first_line(error)})") from error


def _recognise_content(
    path: Path, kind: str, promised: str | None, field: str, encoding: str | None
) -> Readable | Refusal:
    with open_unpacked(path, None) as file:
        head = file.read(_HEAD)
    if not head:
        return Refusal("empty", lost=False)
    if head.startswith(_LFS):
        return Refusal("a pointer of Git LFS, not the file", "`git lfs pull` fetches it")
    if head.startswith(b"PAR1") or kind == "parquet":
        return Readable("parquet")
    if (head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and kind == "arrow") or head.startswith(b"ARROW1\0\0"):
        return Readable("arrow")
    if kind == "arrow":
        raise UserError(f"{path}: is no Arrow file, as its name says")
    codec = codec_of(head)
    if promised and codec is None:
        raise UserError(f"{path}: cannot be unpacked (it is not {promised}, as its name says)")
    if codec:
        with open_unpacked(path, codec) as file:
            head = file.read1(_HEAD)  # what comes before any damage, which is named when it is read
    if not head:
        return Refusal("empty", lost=False)
    binary = next((what for magic, what in _BINARY.items() if head.startswith(magic)), None)
    if binary is None and head[257:262] == b"ustar":
        binary = "an archive, which has to be unpacked"
    mark = encoding_of(head)
    if binary is None and mark is None and b"\0" in head:
        binary = "binary"
    if binary:
        return Refusal(f"not text but {binary}")
    if mark == "utf-8-sig" and codec is None:
        readable = Readable(kind, None, None, 3)
    else:
        readable = Readable(kind, codec, mark)
    return _check_text(path, readable, field, encoding)


def _check_text(path: Path, readable: Readable, field: str, encoding: str | None) -> Readable | Refusal:
    """Returns how a file is read that looks like text, after reading it."""
    suffix = _suffix(path)
    try:
        if readable.kind == "json" or not suffix:
            with _opened(path, readable) as file:
                kind = _json_kind(file, suffix, field)
            if kind is None:
                return Refusal(f"JSON without a string {field!r}", "--field names another key")
            readable = dataclasses.replace(readable, kind=kind)
        if readable.kind == "jsonl" and encoding is None:
            return readable  # its bad lines are named when they are read
        with _opened(path, readable) as file:
            wrong = first_undecodable(file)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeError) and readable.encoding:
            return Refusal(NOT_UTF8, f"{readable.encoding} by its mark, but {first_line(error)}")
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise UserError(f"{path}: is neither a JSON array nor JSON lines that can be read ({reason})") from error
    if wrong is None:
        return readable
    if encoding is None or readable.encoding:
        return Refusal(NOT_UTF8, f"{wrong}; --encoding latin-1, or whatever it is in, reads it")
    readable = dataclasses.replace(readable, encoding=encoding)
    try:
        with _opened(path, readable) as file:
            first_undecodable(file)
    except UnicodeError as error:
        return Refusal(NOT_UTF8, f"{wrong}; nor {encoding}: {first_line(error)}")
    return readable


def _suffix(path: Path) -> str:
    return Path(without_codec_suffix(path.name)[0]).suffix.lower()


def _opened(path: Path, readable: Readable) -> BinaryIO:
    file = open_utf8(path, readable.codec, readable.encoding)
    if readable.begin:
        file.seek(readable.begin)
    return file


def _json_kind(file: BinaryIO, suffix: str, field: str) -> str | None:
    """Returns "jsonl", "json" or, of a file without a suffix, "text", by its content; None of an object without text.

    Raises:
      ValueError, RecursionError: a .json file is not JSON, or nested too deeply.
    """
    first = next((line for line in iter(lambda: file.readline(_LONGEST_LINE), b"") if line.strip()), b"")
    if first.lstrip().startswith(b"[") and suffix:
        return "json"
    if suffix not in ("", ".json"):
        return "jsonl"
    try:
        value = json.loads(first)
    except ValueError:
        value = None
    if not suffix:
        return "jsonl" if isinstance(value, dict) and field in value else "text"
    if value is None:  # one value in several lines
        value = next(json_items(io.BytesIO(first + file.read(_LONGEST_LINE))))
        return "json" if isinstance(value, dict) and isinstance(value.get(field), str) else None
    several = bool(file.read(_HEAD).strip())
    return "jsonl" if several or (isinstance(value, dict) and isinstance(value.get(field), str)) else None
