"""Tokenizers from a tokenizer.json (the format of the `tokenizers` library), and training a byte-level BPE.

Text is never matched against special tokens: a document that contains "<|endoftext|>" gets the ids of those characters.

A byte-level vocabulary (GPT-2's alphabet of 256 characters for bytes; Radford et al. 2019, section 2.2) writes any
bytes exactly, and `token_bytes` is exact. In other vocabularies (SentencePiece-like with "▁", WordPiece) the bytes of
an id are those of its token, with "▁" for a space and "<0x0A>" for one byte: exact as far as the tokenizer gives a text
back; a space that it adds before a text counts too.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.tokenizers.bytes import Tokenizer

START_TOKEN = "<|endoftext|>"
START_TOKENS = (
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "<s>",
    START_TOKEN,
    "[CLS]",
    "<|im_start|>",
)
"""Usual names of the token that opens a text, in the order in which they are looked for."""

_SURROGATES = re.compile("([\udc80-\udcff]+)")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class FileTokenizer(Tokenizer):
    """A tokenizer.json; see `recollect.data.tokenizers.Tokenizer` for what it offers.

    Args:
      path: of the file.
      start: the token that opens documents; None takes the first of `START_TOKENS` that it has.

    Raises:
      UserError: no such file, not a tokenizer, or no such token.
    """

    def __init__(self, path: Path, start: str | None = None):
        self.name = str(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer={self.name!r}: {error.strerror}; a tokenizer is bytes, bpe:SIZE or a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            content = json.loads(raw)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer={self.name!r}: is no tokenizer.json ({first_line(error)})") from error
        self.file = raw
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = {token["content"]: bool(token.get("special")) for token in content.get("added_tokens", ())}
        self.start_token, self.start = self._find_start(start, added)
        self.digest = hashlib.sha256(raw + b"\0" + self.start_token.encode("utf-8")).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(vocabulary.values()) + 1
        # Bytes written as characters of GPT-2's alphabet.
        self._byte_level = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        self._bytes_of = [b""] * self.vocabulary
        for token, number in vocabulary.items():
            if not added.get(token):
                literal = token in added and self._byte_level
                self._bytes_of[number] = token.encode("utf-8") if literal else _token_bytes(token, self._byte_level)
        self.token_bytes = np.array(list(map(len, self._bytes_of)), np.int32)
        self._byte_ids = {raw[0]: number for number, raw in enumerate(self._bytes_of) if len(raw) == 1}

    def _find_start(self, name: str | None, added: dict[str, bool]) -> tuple[str, int]:
        # A token learned from text may look like such a name ("<s>" in a page's source): only added tokens count.
        for token in [token for token in START_TOKENS if token in added] if name is None else [name]:
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return token, number
        looked = ", ".join(START_TOKENS) if name is None else repr(name)
        raise UserError(
            f"tokenizer={self.name!r}: has no token to open a document with (looked for {looked}); "
            "name one with --start"
        )

    def ids(self, text: bytes) -> Int[np.ndarray, " n"]:
        """Returns the ids of a chunk, without `start`; exact for any bytes if byte-level, else for UTF-8."""
        exact = self._byte_level and len(self._byte_ids) == 256
        ids: list[int] = []
        for part in _SURROGATES.split(text.decode("utf-8", errors="surrogateescape" if exact else "replace")):
            if "\udc80" <= part[:1] <= "\udcff":
                ids += [self._byte_ids[ord(character) - 0xDC00] for character in part]
            elif part:
                ids += self._tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens; what is not UTF-8 shows as the replacement character."""
        if self._byte_level:
            return super().decode(ids)
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of ids, without special tokens."""
        if self._byte_level:
            return b"".join([self._bytes_of[int(number)] for number in ids])
        return self.decode(ids).encode("utf-8")


def _token_bytes(token: str, byte_level: bool) -> bytes:
    """Returns the bytes that a token of the vocabulary stands for."""
    if byte_level:
        alphabet = _byte_alphabet()
        return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode("utf-8") for c in token)
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.removeprefix("##").replace("▁", " ").encode("utf-8")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Returns character -> byte: printable Latin-1 stands for itself, the other bytes for 256, 257, ... in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def train_bpe(texts: Iterator[str], size: int) -> str:
    """Returns the tokenizer.json of a byte-level BPE fitted to texts (Sennrich et al. 2016; on bytes as GPT-2).

    The vocabulary has all 256 bytes and `START_TOKEN`, so no text is unknown. Equal texts give an equal file. It has
    fewer than `size` entries when the texts have too few pairs to merge.
    """
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[START_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained.to_str(pretty=True)
