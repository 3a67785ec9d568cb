"""Texts of TFDS data sets by name, as array_record and without TensorFlow.

Data sets are looked for, and downloaded to, the folder TFDS_DATA_DIR, else tfds/ in the cache folder. "tfds:FOLDER"
reads a folder that holds a prepared data set.

Easy to get wrong:
- `tfds.builder("c4")` finds no such data set where TensorFlow is missing: TFDS stops importing its older packages at
  the first that needs it. Importing the text packages themselves registers c4, wikipedia, wiki40b and the like.
- `tfds.data_source(name)` does not find local data sets that `builder.as_data_source()` finds (tensorflow/datasets
  issue 5665), and the default file format needs TensorFlow: hence builders, always with file_format="array_record".
- TFDS prepares c4 and wikipedia with Apache Beam: without apache-beam installed they can be read, but not prepared.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.configuration.machine import cache_folder, expanded
from recollect.configuration.user_paths import path_kind
from recollect.data.text.preparation.documents import SourcePart
from recollect.data.text.preparation.file_parts import Parts, ReadFile
from recollect.data.text.preparation.listing import LeftOut, Selection

_FORMAT = "array_record"
_OLDER_PACKAGES = ("text", "summarization", "question_answering", "translate")


def tfds_parts(
    source: str, field: str, task_bytes: Callable[[int], int], selection: Selection = Selection()
) -> tuple[Parts, str]:
    """Returns the parts of a data set, downloaded and prepared if need be, and its fingerprint.

    The fingerprint covers name, version and sizes of splits.

    Args:
      source: "tfds:" and a name, name/config or folder.
      field: the feature that holds the text; "text" also means the only text feature, whatever its name.
      task_bytes: bytes of the whole source -> bytes per task, about.
      selection: a share of the training split to hold out, or the name of another split.

    Raises:
      UserError: no such data set, it can't be had without TensorFlow, or it has no text.
    """
    name = source.removeprefix("tfds:")
    folder = expanded(name, f"source={source!r}")
    is_folder = path_kind(folder, f"source={source!r}") == "folder"
    with _temporary_files_deleted():
        builder = _folder_builder(source, folder) if is_folder else _named_builder(source, name)
        feature = _text_feature(source, builder.info.features or {}, field)
        if not is_folder:
            _download(source, builder)
        splits = builder.info.splits
    if "train" not in splits:
        raise UserError(f"source={source!r}: has no train split, only {', '.join(splits)}")
    used = {"train": "train" if (held_out := _held_out(source, splits, selection)) else None}
    if held_out:
        used[held_out] = "held_out"
    step = task_bytes(sum(int(splits[split].num_bytes) for split in used))
    parts = []
    described = [builder.info.full_name, feature]
    for split, role in used.items():
        count, size = splits[split].num_examples, int(splits[split].num_bytes)
        described.append(f"{split} {count} {splits[split].num_bytes}")
        pieces = min(max(-(-size // step), 1), max(count, 1))
        for piece in range(pieces):
            begin, end = count * piece // pieces, count * (piece + 1) // pieces
            parts.append(
                SourcePart("tfds", str(builder.data_dir), split, begin, end, size // pieces, begin, feature, role)
            )
    read = [ReadFile(split, int(splits[split].num_bytes), split) for split in used]
    left_out = [
        LeftOut(split, int(splits[split].num_bytes), f"the {split} split", f"--held-out {split} takes it", False)
        for split in splits
        if split not in used
    ]
    return Parts(parts, read, left_out), hashlib.sha256("\n".join(described).encode("utf-8")).hexdigest()


def _held_out(source: str, splits: Any, selection: Selection) -> str | None:
    """Returns the split to hold out; None for a share of the training split."""
    if selection != Selection(held_out=selection.held_out):
        raise UserError(f"source={source!r}: of the options about files, it takes --held-out alone")
    if selection.held_out is None:
        return next((split for split in ("validation", "test") if split in splits), None)
    if selection.share is not None:
        return None
    if selection.held_out not in splits or selection.held_out == "train":
        raise UserError(f"held_out={selection.held_out!r}: is no share and no split of {source}: {', '.join(splits)}")
    return selection.held_out


def _text_feature(source: str, features: Any, field: str) -> str:
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if field in texts:
        return field
    if not texts:
        raise UserError(f"source={source!r}: the data set has no text feature, only {', '.join(features)}")
    if field != "text" or len(texts) > 1:
        raise UserError(
            f"source={source!r}: has no text feature {field!r}, only {', '.join(texts)}; prepare it with --field"
        )
    return texts[0]


@contextlib.contextmanager
def _temporary_files_deleted() -> Iterator[None]:
    """Deletes the temporary folder that TFDS makes to look a data set up on its servers, and leaves behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="recollect-tfds-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _folder_builder(source: str, folder: Path) -> Any:
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        raise UserError(f"source={source!r}: is no folder of a TFDS data set ({_named_line(error)})") from error
    kind = builder.info.file_format.value if builder.info.file_format else "nothing"
    if kind != _FORMAT:
        raise UserError(
            f"source={source!r}: holds {kind}, which needs TensorFlow; only data sets prepared with "
            f"file_format={_FORMAT!r} can be read"
        )
    return builder


def _named_builder(source: str, name: str) -> Any:
    for package in _OLDER_PACKAGES:
        # Without them the name may still be known; an error is then about the name.
        with contextlib.suppress(Exception):
            importlib.import_module(f"tensorflow_datasets.{package}")
    folder = os.environ.get("TFDS_DATA_DIR") or cache_folder() / "tfds"
    try:
        return tfds.builder(name, data_dir=folder, file_format=_FORMAT)
    except Exception as error:
        raise UserError(
            f"source={source!r}: TFDS has no such data set for use without TensorFlow ({_named_line(error)})"
        ) from error


def _download(source: str, builder: Any) -> None:
    prepared = (Path(builder.data_dir) / "dataset_info.json").exists()
    needs_beam = isinstance(builder, tfds.core.BeamBasedBuilder) and importlib.util.find_spec("apache_beam") is None
    if needs_beam and not prepared:
        raise UserError(
            f"source={source!r}: TFDS makes this data set with Apache Beam: `pip install apache-beam`, or bring a "
            f"folder of it prepared as {_FORMAT} and give tfds:FOLDER"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:
        raise UserError(f"source={source!r}: could not be downloaded and prepared ({_named_line(error)})") from error


def _named_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, 300)}"
