"""What a checkpoint keeps of its data, so that it can be used where they have changed, moved or gone.

    saved = read_data(folder)                         # vocabulary, tokenizer, and which corpus it was
    data = with_tokenizer_of(saved, experiment.data)  # the same text, or another, as tokens of its tokenizer

    data.json       vocabulary size; of text, the tokenizer (name, digest, start_token) and the corpus (source, digest)
    tokenizer.json  unless tokens are bytes

A recall task's checkpoint has neither file: its config says it all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.configuration.read_json import read_json
from recollect.data.batch import DataConfig
from recollect.data.text.dataset import Text
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer, open_tokenizer

DATA = "data.json"


@dataclasses.dataclass(frozen=True)
class SavedData:
    """The data that a checkpoint was trained on.

    Attributes:
      vocabulary: number of token ids; None in a checkpoint of an earlier version.
      tokenizer: None where tokens are not text, and in one of an earlier version.
      file: the tokenizer's name for `data.tokenizer`: "bytes", or the path of the checkpoint's tokenizer.json.
      source, digest: of the corpus; None where there is none, the source also in an earlier version's.
    """

    vocabulary: int | None
    tokenizer: Tokenizer | None
    file: str
    source: str | None
    digest: str | None


def write_data(folder: Path, data: DataConfig) -> None:
    """Writes data.json, what `DataConfig.identity` returns, and the data's files (tokenizer.json) into `folder`."""
    write_json(folder / DATA, data.identity())
    for name, content in data.files().items():
        (folder / name).write_bytes(content)


def read_data(folder: Path) -> SavedData:
    """Returns what `write_data` wrote. A checkpoint of an earlier version has nothing but the corpus' digest, if any.

    Raises:
      UserError: it cannot be read.
    """
    entries = read_json(folder / DATA) if (folder / DATA).exists() else {}
    corpus = entries.get("corpus") or {"digest": _earlier_digest(folder / "meta.json")}
    tokenizer, file = None, "bytes"
    if described := entries.get("tokenizer"):
        file = str(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).exists() else "bytes"
        tokenizer = open_tokenizer(file, described["start_token"])
        tokenizer.name = described["name"]
    return SavedData(entries.get("vocabulary"), tokenizer, file, corpus.get("source"), corpus["digest"])


def _earlier_digest(meta: Path) -> str | None:
    state = read_json(meta)["extra"].get("data_state") if meta.exists() else None
    return None if state is None else state["corpus"]


def vocabulary_of(saved: SavedData, data: Any) -> int:
    """Returns the number of token ids of a run: the checkpoint's for text, whose own data may be gone."""
    return saved.vocabulary if saved.vocabulary and isinstance(data, Text) else data.vocabulary


def check_tokenizer(saved: SavedData, before: Any, data: Any) -> None:
    """Raises UserError where an override names a tokenizer that the run was not trained with."""
    if saved.tokenizer is None or not isinstance(data, Text) or not isinstance(before, Text):
        return
    if data.tokenizer is None or (data.tokenizer, data.start_token) == (before.tokenizer, before.start_token):
        return
    if data.open_tokenizer().digest != saved.tokenizer.digest:
        raise UserError(
            f"data.tokenizer={data.tokenizer!r}: is not the tokenizer that the run was trained with, which its "
            "checkpoint has; leave it out"
        )


def with_tokenizer_of(saved: SavedData, data: Any) -> Any:
    """Returns `data` as tokens of the checkpoint's tokenizer.

    Raises:
      UserError: the source is not there, is a prepared folder of another tokenizer, or token ids of an unknown one; or
        the checkpoint was trained on such ids, and the source is text, or has ids that the model lacks.
    """
    if not isinstance(data, Text):
        return data
    said = f"data.source={data.source!r}"
    if saved.tokenizer is None:
        if saved.vocabulary is not None and not data.is_gone():
            _check_ids(saved.vocabulary, data, said)
        return data
    if data.are_ids() and data.tokenizer is None:
        reads = "bytes" if saved.file == "bytes" else f"tokens of {saved.tokenizer.name}"
        raise UserError(
            f"{said}: holds token ids of an unknown tokenizer, and the run reads {reads}; give text, or where the ids "
            f"are of that tokenizer data.tokenizer={saved.file}"
        )
    with contextlib.suppress(UserError):  # a tokenizer's file may be gone, and "bpe:SIZE" is trained anew
        if data.open_tokenizer().digest == saved.tokenizer.digest:
            return data
    if data.is_prepared():
        raise UserError(
            f"{said}: was prepared with {data.prepared().tokenizer.name!r}, another tokenizer "
            f"than the run's; prepare it with --tokenizer {saved.file}, or give the text itself"
        )
    return chz.replace(data, tokenizer=saved.file, start_token=saved.tokenizer.start_token)


def _check_ids(vocabulary: int, data: Text, said: str) -> None:
    """Raises UserError where `data` cannot be what a run on ids of an unknown tokenizer reads."""
    if data.tokenizer is None and not data.are_ids() and not data.is_prepared():
        raise UserError(
            f"{said}: is text, and the run reads token ids of an unknown tokenizer; give files of such ids, or their "
            "tokenizer as data.tokenizer=FILE"
        )
    if data.vocabulary > vocabulary:
        raise UserError(f"{said}: has ids up to {data.vocabulary - 1:,}, and the run's model has {vocabulary:,} ids")


def corpus_of(saved: SavedData, data: Any, path: str, warn: Callable[[str], None]) -> dict[str, Any]:
    """Returns {"corpus": source and digest} of data that the run in `path` is evaluated on, {} where there is none.

    Calls `warn` with a line where it is another corpus than the run was trained on.
    """
    digest = data.corpus_digest()
    if digest is None:
        return {}
    if saved.digest is not None and saved.digest != digest:
        source = saved.source or "its source"
        warn(
            f"warning: {path} was trained on another corpus than this evaluation's: {source} ({saved.digest[:12]}) "
            f"then, {data.source} ({digest[:12]}) now"
        )
    return {"corpus": {"source": data.source, "digest": digest}}
