"""Writes one GGUF file, as llama.cpp reads: Llama's and Qwen3's layouts, by the names of the `gguf` package (optional).

    model.gguf      metadata, tokenizer, tensors in fp32

Source: gguf 0.19.0, gguf/constants.py and gguf/tensor_mapping.py, and convert_hf_to_gguf.py of llama.cpp, whose Llama
rotates neighbouring dimensions: rows of queries and keys are stored in that order, unlike Qwen3's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recollect.configuration import UserError
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer
from recollect.export.folder import new_folder
from recollect.export.huggingface.layouts import layout_of
from recollect.export.huggingface.model_card import Facts
from recollect.export.huggingface.requirements import require_expressible
from recollect.export.huggingface.tensors import Params, to_layout
from recollect.export.huggingface.tokenizer_files import tokenizer_files
from recollect.models import LanguageModel

FILE = "model.gguf"
ARCHITECTURES = ("llama", "qwen3")


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
      UserError: the model's layout is none of `ARCHITECTURES`, the tokenizer is no byte-level BPE, or there is no gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("format=gguf needs the package gguf: pip install gguf") from error
    require_expressible(model)
    layout = layout_of(model)
    fields = layout.config_of(model)
    kind = fields["model_type"]
    if kind not in ARCHITECTURES or fields.get("use_sliding_window"):
        raise UserError(
            f"format=gguf: this model is {kind}'s, of windows maybe; {' and '.join(ARCHITECTURES)} are written"
        )
    vocabulary = params["embedding"].shape[0]
    with new_folder(Path(directory), FILE.__eq__, overwrite=overwrite) as folder:
        writer = gguf.GGUFWriter(folder / FILE, kind)
        writer.add_name(facts.name)
        writer.add_license(facts.license)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(vocabulary)
        writer.add_context_length(model.maximum_length() or maximum_length)
        _add_sizes(writer, fields)
        _add_tokenizer(writer, tokenizer, gguf.TokenType)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), len(model.mixers))
        for name, array in to_layout(params, layout.tensors_of(model, kind), model):
            stored = _paired(name, array, fields) if kind == "llama" else array
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(stored))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [FILE]


def _add_sizes(writer: Any, fields: dict[str, Any]) -> None:
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])


def _paired(name: str, array: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """Returns a tensor with the rows of queries and keys in the order that llama.cpp rotates: pairs side by side."""
    counts = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    heads = counts.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, kinds: Any) -> None:
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
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token, _ in tokens])
    merges = file["model"]["merges"]
    if merges:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.start)
    writer.add_add_bos_token(True)
