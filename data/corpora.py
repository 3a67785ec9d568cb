"""Text corpora as TFDS data sets in array_record files, read without TensorFlow.

    corpus = open_corpus("stdlib")          # or a file or folder of yours, or "tfds:NAME"
    corpus.train[0], corpus.held_out[0]     # bytes of documents

"stdlib" is the source code of the running interpreter's standard library: some 11 MB of text that every machine has. Its bytes
differ between Python versions, so a corpus carries a digest (sha256 over names and bytes), and numbers are comparable where
digests are equal.

A twentieth of the documents is held out, chosen by a hash of the document's name, so that adding files moves no other file
from one side to the other. A corpus of one document (one .txt file) is divided at a line break instead: its last twentieth is held out.

Corpora are prepared once into a cache folder: RECOLLECT_CACHE, else recollect/ in XDG_CACHE_HOME, else ~/.cache/recollect.

Easy to get wrong:
- TFDS's `tfds.data_source(name)` does not find local data sets that `builder.as_data_source()` finds (tensorflow/datasets issue 5665),
  and its default file format needs TensorFlow: hence builders, always with file_format="array_record".
- Two processes may prepare at once: each writes a folder of its own and renames it; the second finds it there and removes its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from configuration import UserError

HELD_OUT_SHARE = 0.05
KEPT_BYTES = 1 << 28
_FORMAT = "array_record"
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
      name: as the user wrote it.
      digest: sha256, hexadecimal; of names and bytes, or for "tfds:" corpora of the data set's name, version and split sizes.
      train, held_out: bytes of each document.
      folder: where it is prepared.
    """

    name: str
    digest: str
    train: Documents
    held_out: Documents
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Facts for a run's banner and result, JSON-ready."""
        parts = {"train": self.train, "held_out": self.held_out}
        sizes = {name: {"documents": len(part), "bytes": int(part.byte_lengths.sum())} for name, part in parts.items()}
        return {"source": self.name, "digest": self.digest, **sizes}


class Documents(Sequence[bytes]):
    """Documents of one split by number, read when asked for; the first `KEPT_BYTES` of them stay in memory."""

    def __init__(self, source: Any, feature: str, lengths_file: Path):
        self._source = source
        self._feature = feature
        self._lengths_file = lengths_file
        self._kept: dict[int, bytes] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index = int(index) % len(self)
        if index in self._kept:
            return self._kept[index]
        text = self._source[index][self._feature]
        document = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if self._kept_bytes + len(document) <= KEPT_BYTES:
            # A long document is asked for once a piece. Reader threads may count one twice, which keeps a little less.
            self._kept[index] = document
            self._kept_bytes += len(document)
        return document

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each document, (documents,) int64; counted once and kept beside the corpus."""
        if self._lengths_file.exists():
            return np.load(self._lengths_file)
        lengths = np.array([len(document) for document in self], np.int64)
        # In a cache that can't be written they are counted again next time.
        with contextlib.suppress(OSError):
            with tempfile.NamedTemporaryFile(dir=self._lengths_file.parent, suffix=".npy", delete=False) as file:
                np.save(file, lengths)
            os.replace(file.name, self._lengths_file)
        return lengths


def cache_folder() -> Path:
    """Where corpora are prepared."""
    if os.environ.get("RECOLLECT_CACHE"):
        return Path(os.environ["RECOLLECT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recollect"


def open_corpus(source: str) -> Corpus:
    """The corpus called `source`, prepared on first use.

    Args:
      source: "stdlib", "tfds:NAME", or the path of a text file, a .jsonl file (objects with a "text") or a folder of files.

    Raises:
      UserError: no such file, nothing in it, or a data set that can't be had or has no text.
    """
    if source.startswith("tfds:"):
        return _open_tfds(source)
    pairs = list(standard_library_files() if source == "stdlib" else local_documents(Path(source)))
    if not pairs:
        raise UserError(f"source={source!r}: there is no text in it")
    digest = corpus_digest(pairs)
    folder = cache_folder() / "corpora" / digest[:20]
    cls = StandardLibrary if source == "stdlib" else LocalText
    if not folder.exists():
        _prepare(cls, pairs, folder)
    builder = cls(data_dir=folder)
    train, held_out = (_documents(builder, split, "text", folder, split) for split in ("train", "held_out"))
    return Corpus(source, digest, train, held_out, folder)


def corpus_digest(documents: Sequence[tuple[str, bytes]]) -> str:
    """sha256 over names and bytes of documents in their order."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name.encode("utf-8"), text):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def standard_library_files() -> Iterator[tuple[str, bytes]]:
    """(relative path, bytes) of the standard library's modules in order of path, without tests, IDLE and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            text = _readable(path)
            if text:
                yield relative.as_posix(), text


def local_documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of documents: one a file, one a line of .jsonl files. Hidden files and files that are not UTF-8 are left out.

    Raises:
      UserError: no such path, a file given by name that is not UTF-8, or a .jsonl line that has no text.
    """
    path = path.expanduser()
    if path.is_dir():
        files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.relative_to(path).as_posix())
        for file in files:
            relative = file.relative_to(path)
            if not any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
                yield from _file_documents(file, relative.as_posix())
    elif path.is_file():
        if _readable(path) is None:
            raise UserError(f"source={str(path)!r}: is not UTF-8 text")
        yield from _file_documents(path, path.name)
    else:
        raise UserError(f"source={str(path)!r}: no such file or folder; a source is stdlib, a path, or tfds:NAME")


def _file_documents(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    raw = _readable(path)
    if path.suffix != ".jsonl":
        if raw:
            yield name, raw
        return
    for number, line in enumerate((raw or b"").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: expected a JSON object with a string 'text'")
        if text:
            # JSON can write lone surrogates, which UTF-8 can't.
            yield f"{name}:{number}", text.encode("utf-8", errors="replace")


def _readable(path: Path) -> bytes | None:
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return raw


def divide(documents: Sequence[tuple[str, bytes]]) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """(train, held out) documents; neither is empty unless the one document has a single character.

    Raises:
      UserError: one document too short to divide.
    """
    if len(documents) == 1:
        name, text = documents[0]
        at = int(len(text) * (1 - HELD_OUT_SHARE))
        # A line break at or before the mark; else any byte that begins a character.
        at = text.rfind(b"\n", 0, at) + 1 or next((place for place in range(at, 0, -1) if text[place] & 0xC0 != 0x80), 0)
        if at == 0:
            raise UserError(f"{name}: {len(text)} bytes are too few to hold a part out")
        return [(name + ":train", text[:at])], [(name + ":held_out", text[at:])]
    ranks = [int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little") / 2**64 for name, _ in documents]
    # At least one on each side, however few there are.
    bound = min(max(HELD_OUT_SHARE, min(ranks)), sorted(ranks)[-2])
    held_out = [pair for pair, rank in zip(documents, ranks, strict=True) if rank <= bound]
    return [pair for pair, rank in zip(documents, ranks, strict=True) if rank > bound], held_out


class _TextBuilder(tfds.core.GeneratorBasedBuilder):
    """A corpus of named documents; `documents` is needed to prepare, not to read."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (the base class's convention)
    skip_registration = True
    # Nothing is downloaded, so there are no checksums beside the code to look for; the search would import importlib_resources,
    # which TFDS 4.9.10 uses without requiring it.
    code_path = None

    def __init__(self, documents: Sequence[tuple[str, bytes]] = (), **options: Any):
        self._given = documents
        super().__init__(file_format=_FORMAT, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features, description=type(self).__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        train, held_out = divide(self._given)
        return {"train": self._generate_examples(train), "held_out": self._generate_examples(held_out)}

    def _generate_examples(self, documents: Sequence[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, text in documents:
            yield name, {"name": name, "text": text}


class StandardLibrary(_TextBuilder):
    """Source files of the Python standard library, one document a file."""


class LocalText(_TextBuilder):
    """The user's own text files."""


def _prepare(cls: type[_TextBuilder], documents: Sequence[tuple[str, bytes]], folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".preparing-"))
    except OSError as error:
        raise UserError(f"cannot write to the cache folder {folder.parent}: {error}; set RECOLLECT_CACHE to another") from error
    try:
        tfds.disable_progress_bar()
        # TFDS prints that it downloads a data set of unknown size.
        with contextlib.redirect_stdout(io.StringIO()):
            cls(documents, data_dir=own).download_and_prepare()
        try:
            own.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _documents(builder: Any, split: str, feature: str, folder: Path, name: str) -> Documents:
    return Documents(builder.as_data_source(split=split), feature, folder / f"{name}-bytes.npy")


def _open_tfds(source: str) -> Corpus:
    name = source.removeprefix("tfds:")
    folder = cache_folder() / "tfds"
    try:
        builder = tfds.builder(name, data_dir=folder, file_format=_FORMAT)
    except Exception as error:
        raise UserError(f"source={source!r}: TFDS has no such data set for use without TensorFlow ({_first_line(error)})") from error
    texts = [key for key, feature in (builder.info.features or {}).items() if isinstance(feature, tfds.features.Text)]
    if not texts:
        raise UserError(f"source={source!r}: the data set has no text feature, only {', '.join(builder.info.features or ())}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:
        raise UserError(f"source={source!r}: could not be downloaded and prepared ({_first_line(error)})") from error
    splits = builder.info.splits
    if "train" not in splits:
        raise UserError(f"source={source!r}: has no train split, only {', '.join(splits)}")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    train_split, held_out_split = ("train", held_out) if held_out else ("train[:95%]", "train[95%:]")
    feature = "text" if "text" in texts else texts[0]
    facts = [builder.info.full_name, feature, train_split, held_out_split]
    facts += [f"{key} {split.num_examples} {split.num_bytes}" for key, split in sorted(splits.items())]
    digest = hashlib.sha256("\n".join(facts).encode("utf-8")).hexdigest()
    own = Path(builder.data_dir)
    train = _documents(builder, train_split, feature, own, f"recollect-{digest[:12]}-train")
    return Corpus(source, digest, train, _documents(builder, held_out_split, feature, own, f"recollect-{digest[:12]}-held_out"), own)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
