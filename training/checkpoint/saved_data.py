"""What a checkpoint keeps of its data, so that it can be used where they have changed, moved or gone.

saved = read_saved_data(folder)                  # vocabulary, tokenizer, and which corpus it was
data = with_tokenizer_of(saved, experiment.data) # the same text, or another, as tokens of the checkpoint's tokenizer
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.configuration.read_json import read_json
from recollect.data.text.dataset import Text
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer, open_tokenizer


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


def read_saved_data(folder: Path) -> SavedData:
    """Returns what the checkpoint in `folder` keeps of its data.

    Raises:
      UserError: it cannot be read.
    """
    return saved_data(folder, read_json(folder / "meta.json")["extra"])


def saved_data(folder: Path, extra: dict[str, Any]) -> SavedData:
    """Returns the data that `extra` describes ("data": see `DataConfig.identity`), whose files are in `folder`."""
    entries = extra.get("data") or {}
    corpus = entries.get("corpus") or {"digest": (extra.get("data_state") or {}).get("corpus")}
    tokenizer, file = None, "bytes"
    if described := entries.get("tokenizer"):
        file = str(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).exists() else "bytes"
        tokenizer = open_tokenizer(file, described["start_token"])
        tokenizer.name = described["name"]
    return SavedData(entries.get("vocabulary"), tokenizer, file, corpus.get("source"), corpus["digest"])


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
      UserError: the source is not there, or is a prepared folder of another tokenizer.
    """
    if saved.tokenizer is None or not isinstance(data, Text):
        return data
    with contextlib.suppress(UserError):  # a tokenizer's file may be gone, and "bpe:SIZE" is trained anew
        if data.open_tokenizer().digest == saved.tokenizer.digest:
            return data
    if data.is_prepared():
        raise UserError(
            f"data.source={data.source!r}: was prepared with {data.prepared().tokenizer.name!r}, another tokenizer "
            f"than the run's; prepare it with --tokenizer {saved.file}, or give the text itself"
        )
    return chz.replace(data, tokenizer=saved.file, start_token=saved.tokenizer.start_token)


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
