"""Writes and reads a whole Hugging Face folder."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.configuration.read_json import read_json_object
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer, open_tokenizer
from recollect.export.folder import new_folder
from recollect.export.huggingface.layouts import LAYOUTS, UNTIED, code, layout_of
from recollect.export.huggingface.model_card import Facts, model_card
from recollect.export.huggingface.requirements import HuggingFaceConfig, fields_of, require_expressible
from recollect.export.huggingface.tensors import Params, check_shapes, from_layout, to_layout, with_own_head
from recollect.export.huggingface.tokenizer_files import tokenizer_files
from recollect.export.huggingface.weights import StoredWeights, write_weights
from recollect.models import LanguageModel, count

SHARD_BYTES = 5 * 10**9
"""Bytes above which weights are split, as in transformers."""

_FILES = (code.CODE, "config.json", "generation_config.json", "README.md", "tokenizer*.json", "model*.safetensors*")


def export_huggingface(
    params: Params,
    model: LanguageModel,
    directory: Path | str,
    *,
    facts: Facts,
    tokenizer: Tokenizer | None = None,
    maximum_length: int = 2048,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    as_code: bool = False,
) -> list[str]:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads, whole or not at all; the same arguments give
    the same bytes. Returns the names of its files.

    Args:
      params: without low-rank updates (`models.adaptation.merged`).
      facts: for the model card.
      tokenizer: of a text model.
      maximum_length: `max_position_embeddings` where the model itself has no limit.
      shard_bytes: above this size weights are split.
      as_code: as a modelling file beside the weights (`trust_remote_code`), not as a class of transformers.

    Raises:
      UserError: no layout can express the model (the field that stands in the way is named), or the folder is taken.
    """
    require_expressible(model, as_code=True)
    layout = code if as_code else layout_of(model)
    if model.tied and layout in UNTIED:
        params, model = with_own_head(params, model)
    fields = code.config_of(model) if as_code else _native_fields(model, layout)
    kind = fields["model_type"]
    length = model.maximum_length() or maximum_length
    start = None if tokenizer is None else tokenizer.start
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), start)
    vocabulary = params["embedding"].shape[0]
    shared = {"vocab_size": vocabulary, "tie_word_embeddings": model.tied, "dtype": "float32", "use_cache": True}
    if kind != "gpt2":
        shared["max_position_embeddings"] = length
    with new_folder(Path(directory), _is_ours, overwrite=overwrite) as folder:
        names = write_weights(to_layout(params, layout.tensors_of(model, kind), model), folder, shard_bytes)
        write_json(folder / "config.json", dict(sorted({**fields, **shared, **special}.items())))
        write_json(folder / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_p": 0.95})
        files = {} if tokenizer is None else tokenizer_files(tokenizer, length)
        files |= code.code_of(model) if as_code else {}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        card = model_card(facts, kind, count(params), has_tokenizer=tokenizer is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return [*names, "config.json", "generation_config.json", *files, "README.md"]


def _native_fields(model: LanguageModel, layout: Any) -> dict[str, Any]:
    """Returns the fields of config.json of a layout; an error names `--code` where that can express the model."""
    try:
        require_expressible(model)
        return fields_of(model, layout)
    except UserError as error:
        try:
            code.config_of(model)
        except UserError:
            raise error from None
        raise UserError(f"{error}; --code (as_code=True) exports it, as PyTorch code") from error


def import_huggingface(directory: Path | str) -> tuple[Params, LanguageModel, Tokenizer | None]:
    """Returns parameters (numpy, fp32), the model's config and the tokenizer of a folder in one of the layouts. No code
    that comes with it is run, and nothing is unpickled.

    Raises:
      UserError: a file is missing, damaged or does not fit the others, or the model is one that this project lacks.
    """
    directory = Path(directory)
    path = directory / "config.json"
    config = HuggingFaceConfig(read_json_object(path), str(path))
    # What this project wrote is read from its config; the code beside it is not.
    if "auto_map" in config.fields and config.fields.get("model_type") not in code.CLASSES:
        raise UserError(f"{path}: auto_map names code to run, which is never done here")
    kind = config.fields.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(f"{path}: model_type={kind!r} cannot be imported; {', '.join(LAYOUTS)} can")
    if config.fields.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config: quantised weights cannot be imported")
    weights = StoredWeights(directory, getattr(LAYOUTS[kind], "RENAMED", {}))
    # Before anything is built for them: a config may ask for more layers than any memory holds.
    layers = config.whole("n_layer" if kind == "gpt2" else "num_hidden_layers")
    if layers > len(weights.shapes):
        raise UserError(f"{path}: asks for {layers:,} layers, and there are {len(weights.shapes):,} tensors")
    layout, vocabulary = LAYOUTS[kind], config.whole("vocab_size")
    try:
        model = layout.model_of(config)
        tensors = layout.tensors_of(model, kind)
        check_shapes(weights.shapes, tensors, model, vocabulary, str(directory))
    except (OverflowError, MemoryError) as error:
        raise UserError(f"{path}: sizes that cannot be: {error}") from None
    params = from_layout(weights.arrays(), tensors, model, vocabulary)
    return params, model, _tokenizer(directory, vocabulary)


def is_huggingface(directory: Path) -> bool:
    """Returns whether a folder's config.json is one of transformers'."""
    path = directory / "config.json"
    return path.is_file() and "model_type" in read_json_object(path)


def _tokenizer(directory: Path, vocabulary: int) -> Tokenizer | None:
    """Returns the tokenizer of a folder; its configured start token opens documents."""
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    settings = directory / "tokenizer_config.json"
    start = read_json_object(settings).get("bos_token") if settings.is_file() else None
    start = start.get("content") if isinstance(start, dict) else start
    tokenizer = open_tokenizer(str(directory), start if isinstance(start, str) else None)
    if tokenizer.vocabulary > vocabulary:
        size = f"{tokenizer.vocabulary:,} tokens; the model has {vocabulary:,}"
        raise UserError(f"{directory / TOKENIZER_FILE}: has {size}")
    return tokenizer


def _is_ours(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)
