"""Shards of prepared text: the documents of one task as tokens, in one array_record file per split.

A record holds up to `RECORD` tokens of one document, so that a part of a long one is read without the rest. Records are
what TFDS's feature connectors make of {"name", "tokens"}, tokens as raw bytes of uint16, or int32 from 65,536 ids on (a
Sequence feature takes 15 times longer), and the folder has TFDS's own metadata:
`tfds.builder_from_directory(folder).as_data_source(split=...)` reads it.

A task's files are written under other names and renamed, its summary last: a task that has a summary is done. All it
writes follows from the task alone, whichever process works on it, when, and however often.

Easy to get wrong: a tf.Example is a map, which protobuf writes in an order that differs from process to process unless
asked to be deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from jaxtyping import Int
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from recollect.configuration.io import TEMPORARY, file_sha256
from recollect.data.text.preparation.documents import Document, SourcePart, read_documents
from recollect.data.text.preparation.manifest import SPLITS, TOKEN_BYTES, arrays_of, task_file, write_sealed
from recollect.data.text.preparation.sources import split_of
from recollect.data.tokenizers import Tokenizer, open_tokenizer

RECORD = 1 << 16
_NAME = "prepared_text"
_WRITER_OPTIONS = "group_size:1"
_tokenizer = functools.lru_cache(maxsize=2)(open_tokenizer)


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """All that a process needs to write one shard of each split.

    Attributes:
      folder: where shards go.
      number, count: which task of how many.
      parts: parts of the source to read.
      held_out_bound: see `recollect.data.text.preparation.sources.Division`.
      tokenizer, start: arguments of `recollect.data.tokenizers.open_tokenizer`.
    """

    folder: Path
    number: int
    count: int
    parts: tuple[SourcePart, ...]
    held_out_bound: float
    tokenizer: str
    start: str | None

    @property
    def size(self) -> int:
        """Bytes of text to read, about."""
        return sum(part.size for part in self.parts)


def write_shards(task: ShardTask) -> dict[str, Any]:
    """Does one task: writes its shards, then its lengths, then its summary, which is returned too.

    Raises:
      UserError: the source can't be read.
      OSError: the folder can't be written; array_record raises RuntimeError or ValueError.
    """
    tokenizer = _tokenizer(task.tokenizer, task.start)
    with tempfile.TemporaryDirectory(dir=task.folder, prefix=TEMPORARY, ignore_cleanup_errors=True) as temporary:
        lengths_file = Path(temporary) / "lengths.npz"
        writers = {split: _ShardWriter(Path(temporary) / split, tokenizer, split) for split in SPLITS}
        empty = EmptyRows()
        for part in task.parts:
            for document in read_documents(part, empty.add):
                writers[split_of(part, document.name, task.held_out_bound)].add(document, part.continues)
        summary: dict[str, Any] = {
            "number": task.number,
            "source_bytes": task.size,
            "tokenizer": tokenizer.digest,
            "empty": dataclasses.asdict(empty),
        }
        lengths: dict[str, Any] = {}
        for split, writer in writers.items():
            name = f"{_NAME}-{split}.array_record-{task.number:05d}-of-{task.count:05d}"
            summary[split] = {"file": name, **writer.close()}
            lengths[f"{split}_documents"] = writer.document_table()
            lengths[f"{split}_records"] = np.array(writer.records, np.int64)
            if TOKEN_BYTES in arrays_of(split, tokenizer):
                lengths[f"{split}_{TOKEN_BYTES}"] = np.concatenate([np.zeros(0, np.uint32), *writer.token_bytes])
        np.savez(lengths_file, **lengths)
        summary["lengths_sha256"] = file_sha256(lengths_file)
        for split, writer in writers.items():
            _publish(writer.path, task.folder / summary[split]["file"])
        _publish(lengths_file, task_file(task.folder, task.number, ".npz"))
        return write_sealed(task_file(task.folder, task.number, ".json"), summary)


def write_tfds_metadata(folder: Path, vocabulary: int, tasks: list[dict[str, Any]]) -> None:
    """Writes TFDS's features.json and dataset_info.json for the shards in a folder.

    Args:
      folder: has the shards.
      vocabulary: number of token ids.
      tasks: summaries of all tasks, in order.
    """
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=_NAME, filetype_suffix="array_record")
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[task[split]["records"] for task in tasks],
            num_bytes=sum(task[split]["size"] for task in tasks),
            filename_template=template.replace(split=split),
        )
        for split in SPLITS
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(vocabulary),
        split_infos=splits,
        version="1.0.0",
        check_data=False,
        description=f"Text as tokens; each record has up to {RECORD:,} tokens of one document.",
    )


def dtype_for(vocabulary: int) -> np.dtype:
    """Returns the dtype in which tokens are stored: uint16 when every id fits, else int32."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)


@functools.cache
def features(vocabulary: int) -> Any:
    """Returns TFDS's feature connectors of a record."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=dtype_for(vocabulary).type, encoding="bytes")
    return tfds.features.FeaturesDict({"name": tfds.features.Text(), "tokens": tokens})


@dataclasses.dataclass
class EmptyRows:
    """Rows without text: how many, and the name of the first."""

    count: int = 0
    first: str | None = None

    def add(self, name: str) -> None:
        """Counts one."""
        self.count += 1
        self.first = self.first or name


class _ShardWriter:
    """One split's shard and the lengths that go with it."""

    def __init__(self, path: Path, tokenizer: Tokenizer, split: str):
        self.path = path
        self.token_bytes: list[Int[np.ndarray, " n"]] = []
        """Bytes of text that the tokens stand for, kept where a reader needs them."""
        self._keeps_token_bytes = TOKEN_BYTES in arrays_of(split, tokenizer)
        self._unknown_bytes = 0
        self.documents: list[list[int]] = []
        """[tokens, bytes, 1 where it began in the task before] of each document."""
        self.records: list[int] = []
        self._tokenizer = tokenizer
        self._features = features(tokenizer.vocabulary)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._content = hashlib.sha256()

    def add(self, document: Document, continues: bool) -> None:
        """Appends a document, or a part of one that `continues` the document before."""
        self._content.update(f"{document.name}\0{int(continues)}".encode())
        if not (continues and self.documents):
            self.documents.append([0, 0, int(continues)])
        waiting = np.array([] if continues else [self._tokenizer.start], np.int32)
        if self._keeps_token_bytes:
            self.token_bytes.append(np.zeros(len(waiting), np.uint32))
        for chunk in document.chunks:
            self.documents[-1][1] += len(chunk)
            if self._keeps_token_bytes:
                ids, sizes, unknown = self._tokenizer.measured_ids(chunk)
                self.token_bytes.append(sizes.astype(np.uint32))
            else:
                ids = self._tokenizer.ids(chunk)
                unknown = self._tokenizer.unknown_bytes(chunk, ids)
            self._unknown_bytes += unknown
            waiting = np.concatenate([waiting, ids])
            while len(waiting) >= RECORD:
                self._write(document.name, waiting[:RECORD])
                waiting = waiting[RECORD:]
        if len(waiting):
            self._write(document.name, waiting)

    def _write(self, name: str, tokens: np.ndarray) -> None:
        stored = tokens.astype(dtype_for(self._tokenizer.vocabulary))
        example = self._serializer.get_tf_example(self._features.encode_example({"name": name, "tokens": stored}))
        self._writer.write(example.SerializeToString(deterministic=True))
        self._content.update(stored.tobytes())
        self.records.append(len(stored))
        self.documents[-1][0] += len(stored)

    def document_table(self) -> Int[np.ndarray, "documents 3"]:
        """Returns `documents` as an array."""
        return np.array(self.documents, np.int64).reshape(-1, 3)

    def close(self) -> dict[str, Any]:
        """Finishes the file and returns counts and digests of the shard, JSON-ready."""
        self._writer.close()
        tokens, size, continued = self.document_table().sum(axis=0).tolist()
        return {
            "documents": len(self.documents) - continued,
            "tokens": tokens,
            "bytes": size,
            "records": len(self.records),
            "unknown_bytes": self._unknown_bytes,
            "content": self._content.hexdigest(),
            "size": self.path.stat().st_size,
            "sha256": file_sha256(self.path),
        }


def _publish(path: Path, target: Path) -> None:
    """Renames a file once its bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)
