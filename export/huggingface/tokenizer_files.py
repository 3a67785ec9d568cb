"""Tokenizer files as transformers reads them; tokens that are bytes get a tokenizer.json, too."""

from __future__ import annotations

import json

import tokenizers

from recollect.data.tokenizers import START, TOKENIZER_FILE, Tokenizer
from recollect.data.tokenizers.huggingface import START_TOKEN, byte_alphabet


def tokenizer_files(tokenizer: Tokenizer, maximum_length: int) -> dict[str, bytes]:
    """Returns tokenizer.json and tokenizer_config.json. With them, `AutoTokenizer` opens every text with the start
    token, as in training, and knows it as the one that ends documents.

    Args:
      maximum_length: tokens that texts are cut to where a caller asks for it.
    """
    start = tokenizer.start_token or START_TOKEN
    made = tokenizers.Tokenizer.from_str((tokenizer.file or _bytes_file()).decode("utf-8"))
    # What transformers puts before and after a text, it takes from here.
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, tokenizer.start)]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": start,
        "pad_token": start,
        "clean_up_tokenization_spaces": False,
        "model_max_length": maximum_length,
    }
    files = {TOKENIZER_FILE: made.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings, indent=2)}
    return {name: (text + "\n").encode("utf-8") for name, text in files.items()}


def _bytes_file() -> bytes:
    """Returns the tokenizer.json of bytes: ids 0 .. 255 are the bytes, in GPT-2's alphabet, 256 opens a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(byte_alphabet()), merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([START_TOKEN])
    assert made.token_to_id(START_TOKEN) == START
    return made.to_str().encode("utf-8")
