"""Texts of TFDS data sets by name, as array_record and without TensorFlow.

Data sets are looked for, and downloaded to, the folder TFDS_DATA_DIR, else tfds/ in the cache folder. "tfds:FOLDER"
reads a folder that holds a prepared data set.

Easy to get wrong:
- `tfds.builder("c4")` says that there is no such data set where TensorFlow is missing: TFDS stops importing its older
  packages at the first that needs it. Importing the text packages themselves registers c4, wikipedia, wiki40b and the
  like.
- `tfds.data_source(name)` does not find local data sets that `builder.as_data_source()` finds (tensorflow/datasets
  issue 5665), and the default file format needs TensorFlow: hence builders, always with file_format="array_record".
- Of c4 and wikipedia TFDS has recipes, which run on Apache Beam: without apache-beam installed they can be read, not
made.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from recollect.configuration import UserError
from recollect.configuration.paths import cache_folder
from recollect.data.text.preparation.formats import Unit

_FORMAT = "array_record"
_OLDER_PACKAGES = ("text", "summarization", "question_answering", "translate")


def tfds_units(source: str, field: str, shard_bytes: Callable[[int], int]) -> tuple[list[Unit], str]:
    """Units of a data set, downloaded and prepared if need be, and its fingerprint (name, version and sizes of splits).

    Args:
      source: "tfds:" and a name, name/config or folder.
      field: the feature that holds the text; "text" also means the only text feature, whatever its name.
      shard_bytes: bytes of all -> bytes of a unit, about.

    Raises:
      UserError: no such data set, it can't be had without TensorFlow, or it has no text.
    """
    name = source.removeprefix("tfds:")
    builder = _folder_builder(source, Path(name)) if Path(name).expanduser().is_dir() else _named_builder(source, name)
    feature = _text_feature(source, builder.info.features or {}, field)
    splits = builder.info.splits
    if "train" not in splits:
        raise UserError(f"source={source!r}: has no train split, only {', '.join(splits)}")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    used = {"train": "train" if held_out else None} | ({held_out: "held_out"} if held_out else {})
    step = shard_bytes(sum(int(splits[split].num_bytes) for split in used))
    units = []
    for split, side in used.items():
        count, size = splits[split].num_examples, int(splits[split].num_bytes)
        parts = min(max(-(-size // step), 1), max(count, 1))
        for part in range(parts):
            begin, end = count * part // parts, count * (part + 1) // parts
            units.append(Unit("tfds", str(builder.data_dir), split, begin, end, size // parts, begin, feature, side))
    facts = [
        builder.info.full_name,
        feature,
        *(f"{split} {splits[split].num_examples} {splits[split].num_bytes}" for split in used),
    ]
    return units, hashlib.sha256("\n".join(facts).encode("utf-8")).hexdigest()


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


def _folder_builder(source: str, folder: Path) -> Any:
    try:
        builder = tfds.builder_from_directory(folder.expanduser())
    except Exception as error:
        raise UserError(f"source={source!r}: is no folder of a TFDS data set ({_first_line(error)})") from error
    if builder.info.file_format is None or builder.info.file_format.value != _FORMAT:
        kind = builder.info.file_format.value if builder.info.file_format else "nothing"
        raise UserError(f"source={source!r}: holds {kind}, which needs TensorFlow; only {_format_words()} can be read")
    return builder


def _named_builder(source: str, name: str) -> Any:
    for package in _OLDER_PACKAGES:
        # Without them the name may still be found; an error then tells of the name.
        with contextlib.suppress(Exception):
            importlib.import_module(f"tensorflow_datasets.{package}")
    folder = os.environ.get("TFDS_DATA_DIR") or cache_folder() / "tfds"
    try:
        builder = tfds.builder(name, data_dir=folder, file_format=_FORMAT)
    except Exception as error:
        raise UserError(
            f"source={source!r}: TFDS has no such data set for use without TensorFlow ({_first_line(error)})"
        ) from error
    if not any(isinstance(feature, tfds.features.Text) for feature in (builder.info.features or {}).values()):
        raise UserError(
            f"source={source!r}: the data set has no text feature, only {', '.join(builder.info.features or ())}"
        )
    prepared = (Path(builder.data_dir) / "dataset_info.json").exists()
    if (
        isinstance(builder, tfds.core.BeamBasedBuilder)
        and not prepared
        and importlib.util.find_spec("apache_beam") is None
    ):
        raise UserError(
            f"source={source!r}: TFDS makes this data set with Apache Beam: `pip install apache-beam`, or bring a folder of it "
            f"prepared as {_FORMAT} and give tfds:FOLDER"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format=_FORMAT)
    except Exception as error:
        raise UserError(f"source={source!r}: could not be downloaded and prepared ({_first_line(error)})") from error
    return builder


def _format_words() -> str:
    return f"data sets prepared with file_format={_FORMAT!r}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
