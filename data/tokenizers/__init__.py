"""Tokenizers: text to token ids and back.

    tokenizer = open_tokenizer("bytes")              # or the path of a tokenizer.json (data/tokenizers/huggingface.py)
    tokenizer.encode("naïve")                        # ids, the opening one first

Bytes need no training, no download and no vocabulary file, and any text of any language can be written with them. The
one token besides the 256 bytes, START, opens every document: from it the model predicts the first byte, and generation
begins there.

Easy to get wrong: a cut in the middle of a text may split a character of several bytes, so decoding replaces what is
not UTF-8.
"""

from pathlib import Path

from recollect.configuration import UserError
from recollect.configuration.machine import expanded
from recollect.configuration.user_paths import path_kind
from recollect.data.tokenizers.bytes import START, ByteTokenizer, Tokenizer
from recollect.starting import PROGRAM

__all__ = ["START", "TOKENIZER_FILE", "ByteTokenizer", "Tokenizer", "bpe_size", "open_tokenizer", "tokenizer_file"]

SMALLEST_BPE, LARGEST_BPE = 257, 1 << 24
TOKENIZER_FILE = "tokenizer.json"


def open_tokenizer(name: str, start: str | None = None) -> Tokenizer:
    """Returns the tokenizer called `name`.

    Args:
      name: "bytes", or the path of a tokenizer.json or of the folder that holds it.
      start: the special token of a tokenizer.json that opens documents; None looks for one of the usual names.

    Raises:
      UserError: there is none of that name, or it has no token that could open a document.
    """
    if name == "bytes":
        if start is not None:
            raise UserError(
                f"start={start!r}: only a tokenizer.json has named tokens; bytes open a document with their own"
            )
        return ByteTokenizer()
    if name.startswith("bpe:"):
        raise UserError(
            f"tokenizer={name!r}: is trained on a source, by `{PROGRAM} prepare SOURCE OUT --tokenizer {name}`"
        )
    # Importing tokenizers takes a moment, which byte models needn't pay.
    from recollect.data.tokenizers.huggingface import FileTokenizer

    return FileTokenizer(tokenizer_file(name), start)


def tokenizer_file(path: str) -> Path:
    """Returns the path of a tokenizer.json: the path itself, or in the folder that it names."""
    said = f"tokenizer={path!r}"
    file = expanded(path, said)
    return file / TOKENIZER_FILE if path_kind(file, said) == "folder" else file


def bpe_size(name: str) -> int | None:
    """Returns the vocabulary size that "bpe:SIZE" asks for; None for another name.

    Raises:
      UserError: the size is no number or too small.
    """
    if not name.startswith("bpe:"):
        return None
    text = name.removeprefix("bpe:")
    if not text.isascii() or not text.isdigit() or int(text) < SMALLEST_BPE:
        raise UserError(
            f"tokenizer={name!r}: bpe:SIZE needs a size of at least {SMALLEST_BPE} (256 bytes and a start token)"
        )
    if len(text) > 8 or int(text) > LARGEST_BPE:
        raise UserError(f"tokenizer={name!r}: bpe:SIZE takes a size of at most {LARGEST_BPE:,}")
    return int(text)
