"""Writes an opened run as an export, and opens an export, or a Hugging Face folder, as a run is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import chz

from recollect.configuration import UserError
from recollect.data.text.dataset import Text
from recollect.data.tokenizers import TOKENIZER_FILE, ByteTokenizer, Tokenizer, open_tokenizer
from recollect.export.huggingface import import_huggingface, is_huggingface
from recollect.export.safetensors_format import MANIFEST, export_safetensors, load_safetensors, read_manifest
from recollect.models.adaptation import merged
from recollect.models.functional import Params
from recollect.training.checkpoint.saved_data import SavedData
from recollect.training.experiment import Experiment
from recollect.training.saved_experiment import as_experiment


def write_safetensors(
    run: Any, out: Path, code: Mapping[str, bytes] = MappingProxyType({}), overwrite: bool = False
) -> list[str]:
    """Writes an opened run (`SavedRun`) in this project's layout, with files of the user's `code` that its config
    needs; returns the names of the files for its user."""
    tokenizer = run.data.tokenizer
    params, model = merged(run.params, run.experiment.model, run.vocabulary)
    extra: dict[str, Any] = {"step": run.step, "vocabulary": run.vocabulary}
    if tokenizer is not None:
        corpus = {"source": run.data.source, "digest": run.data.digest}
        extra |= {"tokenizer": tokenizer.identity(), "corpus": corpus}
    files = {} if tokenizer is None or tokenizer.file is None else {TOKENIZER_FILE: tokenizer.file}
    config = chz.replace(run.experiment, model=model)
    export_safetensors(params, config, out, extra=extra, files={**files, **code}, overwrite=overwrite)
    return ["model.safetensors", "config.json", *files, *code]


def open_export(path: Path) -> tuple[Params, Experiment, int, SavedData]:
    """Returns parameters (numpy), experiment, step and data of a folder without checkpoints.

    A Hugging Face folder names no experiment: it gets one with the model, and text as tokens of its tokenizer.

    Raises:
      UserError: it is neither, or what it holds does not fit together.
    """
    if (path / MANIFEST).is_file():
        params, config = load_safetensors(path)
        extra = read_manifest(path)["extra"]
        data = _saved_data(path, extra.get("vocabulary"), extra.get("tokenizer"), extra.get("corpus") or {})
        return params, as_experiment(config, str(path)), int(extra.get("step") or 0), data
    if is_huggingface(path):
        params, model, tokenizer = import_huggingface(path)
        length = min(Text().length, model.maximum_length() or Text().length)
        text = Text(length=length) if tokenizer is None else _text(tokenizer, length)
        name = re.sub(r"[^\w.-]", "_", path.resolve().name).strip(".") or "imported"
        saved = SavedData(params["embedding"].shape[0], tokenizer, text.tokenizer or "bytes", None, None)
        return params, Experiment(name=name, model=model, data=text), 0, saved
    raise UserError(f"{path} is not a run folder: it has no checkpoints/; nor an export, with manifest.json")


def _text(tokenizer: Tokenizer, length: int) -> Text:
    return Text(tokenizer=tokenizer.name, start_token=tokenizer.start_token, length=length)


def _saved_data(path: Path, vocabulary: int | None, described: object, corpus: dict[str, str]) -> SavedData:
    """Returns the data that an export's manifest records."""
    tokenizer: Tokenizer | None = None
    file = "bytes"
    if isinstance(described, dict):
        if (path / TOKENIZER_FILE).is_file():
            file = str(path / TOKENIZER_FILE)
            tokenizer = open_tokenizer(file, described.get("start_token"))
        else:
            tokenizer = ByteTokenizer()
        if tokenizer.digest != described.get("digest"):
            raise UserError(f"{path / MANIFEST}: was written with another tokenizer than {TOKENIZER_FILE} there")
        tokenizer.name = described.get("name") or tokenizer.name
    return SavedData(vocabulary, tokenizer, file, corpus.get("source"), corpus.get("digest"))
