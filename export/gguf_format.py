"""Writes one GGUF file, as llama.cpp reads, through transformers' layouts (gguf_architectures.py has what llama.cpp
calls them) and the names of the `gguf` package (optional).

    model.gguf      metadata, tokenizer, tensors in fp32
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer
from recollect.export.folder import new_folder
from recollect.export.gguf_architectures import ARCHITECTURES
from recollect.export.huggingface.layouts import UNTIED, layout_of
from recollect.export.huggingface.model_card import Facts
from recollect.export.huggingface.requirements import fields_of, require_expressible
from recollect.export.huggingface.tensors import Params, to_layout, with_own_head
from recollect.export.huggingface.tokenizer_files import tokenizer_files
from recollect.models import LanguageModel

FILE = "model.gguf"


def export_gguf(
    params: Params,
    model: LanguageModel,
    directory: Path | str,
    *,
    facts: Facts,
    tokenizer: Tokenizer | None = None,
    maximum_length: int = 2048,
    overwrite: bool = False,
) -> list[str]:
    """Writes a folder with model.gguf, whole or not at all; returns the names of its files. Arguments as those of
    `export_huggingface`.

    Raises:
      UserError: the model's layout is none of `ARCHITECTURES`, or has what llama.cpp's lacks; the tokenizer is no
        byte-level BPE that splits text as GPT-2 does; or there is no gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("format=gguf needs the package gguf: pip install gguf") from error
    require_expressible(model)
    layout = layout_of(model)
    if model.tied and layout in UNTIED:
        params, model = with_own_head(params, model)
    fields = fields_of(model, layout)
    kind = fields["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(f"format=gguf: this model is {kind}'s; {', '.join(ARCHITECTURES)} are written")
    architecture = ARCHITECTURES[kind]
    metadata = architecture.metadata(fields)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture.name], len(model.mixers))
    with new_folder(Path(directory), FILE.__eq__, overwrite=overwrite) as folder:
        writer = gguf.GGUFWriter(folder / FILE, architecture.name)
        writer.add_name(facts.name)
        writer.add_license(facts.license)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(params["embedding"].shape[0])
        writer.add_context_length(model.maximum_length() or maximum_length)
        for name, value in metadata.items():
            add = _WRITTEN_BY[type(value)]
            getattr(writer, add)(f"{architecture.name}.{name}", value)
        add_tokenizer(writer, tokenizer, gguf.TokenType)
        for name, array in to_layout(params, layout.tensors_of(model, kind), model):
            for stored_name, stored in architecture.stored(name, array, fields):
                theirs = names.get_name(stored_name, (".weight", ".bias"))
                writer.add_tensor(theirs, np.ascontiguousarray(stored, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [FILE]


_WRITTEN_BY: dict[type, str] = {int: "add_uint32", float: "add_float32", bool: "add_bool", list: "add_array"}


def add_tokenizer(writer: Any, tokenizer: Tokenizer | None, kinds: Any) -> None:
    """Writes the vocabulary and merges of a byte-level BPE, and the token that opens and ends documents."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    file = json.loads(tokenizer_files(tokenizer, 2048)[TOKENIZER_FILE])
    if file["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(file["decoder"]):
        raise UserError(f"format=gguf: the tokenizer is a {file['model']['type']}; byte-level BPE is written")
    ids = dict(file["model"]["vocab"])
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    tokens = sorted({**ids, **special}.items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token, _ in tokens])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    split = file["pre_tokenizer"] or {}
    if merges and (split.get("type") != "ByteLevel" or not split.get("use_regex") or split.get("add_prefix_space")):
        raise UserError("format=gguf: the tokenizer does not split text as GPT-2's; no other way is written")
    # llama.cpp requires some, even of bytes alone. This one merges nothing: no part of a text is the start token.
    start = next(token for token, number in special.items() if number == tokenizer.start)
    writer.add_token_merges(merges or [f"{start} {start}"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.start)
    writer.add_add_bos_token(True)
