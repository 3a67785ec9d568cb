"""Writing prepared text: one task's documents as tokens, into one array_record shard a split.

A record holds up to `RECORD` tokens of one document, so that a piece of a long one is read without the rest. Records
are what TFDS's feature connectors make of {"name", "tokens"}, tokens as raw bytes of uint16, or int32 from 65,536 ids
on (a Sequence feature takes 15 times longer), and the folder has TFDS's own metadata:
`tfds.builder_from_directory(folder).as_data_source(split=...)` reads it.

A task's files are written under other names and renamed, its facts last: a task whose facts are there is done. What it
writes follows from the task alone, so who works on it, when, and how often doesn't show.

Easy to get wrong: a tf.Example is a map, which protobuf writes in an order that differs from process to process unless
told otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from recollect.data.text.preparation.formats import Document, Unit, read_unit
from recollect.data.text.preparation.manifest import SPLITS, TEMPORARY, file_digest, part_file, write_sealed
from recollect.data.text.preparation.sources import rank
from recollect.data.tokenizers import Tokenizer, open_tokenizer

RECORD = 1 << 16
_WRITER_OPTIONS = "group_size:1"


class PreparedText(tfds.core.GeneratorBasedBuilder):
    """Text as tokens; each record has up to 65,536 tokens of one document."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (the base class's convention)
    skip_registration = True
    # Nothing is downloaded, so there are no checksums beside the code to look for; the search would import
    # importlib_resources, which TFDS 4.9.10 uses without requiring it.
    code_path = None

    def __init__(self, vocabulary: int, **options: Any):
        self._vocabulary = vocabulary
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=features(self._vocabulary), description=type(self).__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise NotImplementedError(
            "shards are written by recollect.data.text.preparation.shards.write_part, in parallel"
        )

    def _generate_examples(self) -> Iterator[Any]:
        raise NotImplementedError(
            "shards are written by recollect.data.text.preparation.shards.write_part, in parallel"
        )

    def write_metadata(self, folder: Path, shard_lengths: dict[str, list[int]], sizes: dict[str, int]) -> None:
        """Writes features.json and dataset_info.json for shards that are there: records of each shard, and bytes, by
        split."""
        self.info.set_splits(
            tfds.core.splits.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=lengths,
                        num_bytes=sizes[split],
                        filename_template=_template(folder, split),
                    )
                    for split, lengths in shard_lengths.items()
                ]
            )
        )
        self.info.write_to_directory(folder)


def _template(folder: Path, split: str) -> Any:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=PreparedText.name, split=split, filetype_suffix="array_record"
    )


def shard_name(split: str, number: int, count: int) -> str:
    """File name of a shard, as TFDS expects it."""
    return f"{PreparedText.name}-{split}.array_record-{number:05d}-of-{count:05d}"


def dtype_for(vocabulary: int) -> np.dtype:
    """What tokens are stored as: uint16 when every id fits."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)


@functools.cache
def features(vocabulary: int) -> Any:
    """TFDS's connectors of a record."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=dtype_for(vocabulary).type, encoding="bytes")
    return tfds.features.FeaturesDict({"name": tfds.features.Text(), "tokens": tokens})


@dataclasses.dataclass(frozen=True)
class Job:
    """A task with all that a process needs to do it.

    Attributes:
      folder: where shards go.
      number, count: which task of how many.
      units: what to read.
      held_out_bound: see `recollect.data.text.preparation.sources.Source`.
      tokenizer, start: what `recollect.data.tokenizers.open_tokenizer` takes.
    """

    folder: Path
    number: int
    count: int
    units: tuple[Unit, ...]
    held_out_bound: float
    tokenizer: str
    start: str | None


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, start: str | None) -> Tokenizer:
    return open_tokenizer(name, start)


class _ShardWriter:
    """One split's shard and the lengths that go beside it."""

    def __init__(self, path: Path, vocabulary: int):
        self.path = path
        self._features = features(vocabulary)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        self._dtype = dtype_for(vocabulary)
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._content = hashlib.sha256()
        self.documents: list[list[int]] = []
        self.records: list[int] = []

    def add(self, document: Document, tokenizer: Tokenizer) -> None:
        """Appends a document, or the part of one that the unit has."""
        self._content.update(f"{document.name}\0{int(document.continues)}".encode())
        # [tokens, bytes, 1 where it goes on with the document of the task before]
        entry = [0, 0, int(document.continues)]
        kept = [] if document.continues else [np.array([tokenizer.start], np.int32)]
        for stretch in document.stretches:
            entry[1] += len(stretch)
            kept.append(tokenizer.ids(stretch))
            whole = np.concatenate(kept)
            full = len(whole) // RECORD * RECORD
            for begin in range(0, full, RECORD):
                self._write(document.name, whole[begin : begin + RECORD], entry)
            kept = [whole[full:]]
        if len(kept[0]):
            self._write(document.name, kept[0], entry)
        if document.continues and self.documents:
            for place in (0, 1):
                self.documents[-1][place] += entry[place]
        else:
            self.documents.append(entry)

    def _write(self, name: str, tokens: np.ndarray, entry: list[int]) -> None:
        stored = tokens.astype(self._dtype)
        example = self._serializer.get_tf_example(self._features.encode_example({"name": name, "tokens": stored}))
        self._writing(lambda: self._writer.write(example.SerializeToString(deterministic=True)))
        self._content.update(stored.tobytes())
        self.records.append(len(stored))
        entry[0] += len(stored)

    def _writing(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            # What array_record raises when a disk is full.
            raise OSError(" ".join(str(error).split())) from error

    def close(self) -> dict[str, Any]:
        """Facts of the shard, JSON-ready."""
        self._writing(self._writer.close)
        table = np.array(self.documents, np.int64).reshape(-1, 3)
        return {
            "documents": int((table[:, 2] == 0).sum()),
            "tokens": int(table[:, 0].sum()),
            "bytes": int(table[:, 1].sum()),
            "records": len(self.records),
            "content": self._content.hexdigest(),
            "size": self.path.stat().st_size,
            "sha256": file_digest(self.path),
        }


def write_part(job: Job) -> dict[str, Any]:
    """Does one task: its shards, then its lengths, then its facts, which are returned too.

    Raises:
      UserError: the source can't be read.
      OSError: the folder can't be written.
    """
    tokenizer = _tokenizer(job.tokenizer, job.start)
    own = Path(tempfile.mkdtemp(dir=job.folder, prefix=TEMPORARY))
    try:
        writers = {split: _ShardWriter(own / split, tokenizer.vocabulary) for split in SPLITS}
        for unit in job.units:
            for document in read_unit(unit):
                held_out = rank(document.name) <= job.held_out_bound
                writers[unit.split or ("held_out" if held_out else "train")].add(document, tokenizer)
        facts: dict[str, Any] = {"number": job.number, "source_bytes": sum(unit.size for unit in job.units)}
        facts["tokenizer"] = tokenizer.digest
        for split, writer in writers.items():
            facts[split] = {"file": shard_name(split, job.number, job.count), **writer.close()}
        lengths: dict[str, Any] = {}
        for split, writer in writers.items():
            lengths[f"{split}_documents"] = np.array(writer.documents, np.int64).reshape(-1, 3)
            lengths[f"{split}_records"] = np.array(writer.records, np.int64)
        np.savez(own / "lengths.npz", **lengths)
        facts["lengths_sha256"] = file_digest(own / "lengths.npz")
        for split in SPLITS:
            _settle(own / split, job.folder / facts[split]["file"])
        _settle(own / "lengths.npz", part_file(job.folder, job.number, ".npz"))
        return write_sealed(part_file(job.folder, job.number, ".json"), facts)
    finally:
        _remove(own)


def _settle(path: Path, to: Path) -> None:
    """Renames a file when its bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, to)


def _remove(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()
