"""Tokenizers from a tokenizer.json (the format of the `tokenizers` library), and training a byte-level BPE.

Text is never matched against special tokens: a document that has "<|endoftext|>" in it gets the ids of those
characters.

A byte-level vocabulary (GPT-2's alphabet of 256 characters for bytes; Radford et al. 2019, section 2.2) writes any
bytes exactly, and `token_bytes` is exact. Of others (SentencePiece-like with "▁", word pieces) the bytes of an id are
those of its piece, "▁" a space and "<0x0A>" one byte: exact as far as the tokenizer gives a text back; a space that it
sets before a text counts too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from recollect.configuration import UserError
from recollect.data.text.preparation.text_chunks import stretches
from recollect.data.tokenizers import tokenizer_file

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
"""Names under which tokenizers keep the token that opens a text, in the order in which they are looked for."""

_SURROGATES = re.compile("([\udc80-\udcff]+)")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class FileTokenizer:
    """A tokenizer.json; see `recollect.data.tokenizers.Tokenizer` for what it offers.

    Args:
      path: of the file.
      name: what it is called; None: the path.
      start: the token that opens documents; None takes the first of `START_TOKENS` that it has.

    Raises:
      UserError: no such file, not a tokenizer, or no such token.
    """

    def __init__(self, path: str | Path, name: str | None = None, start: str | None = None):
        path = tokenizer_file(str(path))
        self.name = str(path) if name is None else name
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer={self.name!r}: {error.strerror}; a tokenizer is bytes, bpe:SIZE or a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            facts = json.loads(raw)
        except Exception as error:  # the library raises Exception itself
            raise UserError(
                f"tokenizer={self.name!r}: is no tokenizer.json ({' '.join(str(error).split())[:200]})"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = {token["content"]: bool(token.get("special")) for token in facts.get("added_tokens", ())}
        self.start_token, self.start = self._find_start(start, added)
        self.digest = hashlib.sha256(raw + b"\0" + self.start_token.encode("utf-8")).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(vocabulary.values()) + 1
        self._pieces = _byte_pieces(vocabulary, added, self.vocabulary) if _is_byte_level(facts) else None
        pieces = self._pieces or _text_pieces(vocabulary, added, self.vocabulary)
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self._byte_ids = {piece[0]: number for number, piece in enumerate(self._pieces or ()) if len(piece) == 1}

    def _find_start(self, wanted: str | None, added: dict[str, bool]) -> tuple[str, int]:
        # A piece of a text may look like such a name ("<s>" in a page's source): only what was added beside the pieces
        # counts.
        for token in [token for token in START_TOKENS if token in added] if wanted is None else [wanted]:
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return token, number
        looked = ", ".join(START_TOKENS) if wanted is None else repr(wanted)
        raise UserError(
            f"tokenizer={self.name!r}: has no token to open a document with (looked for {looked}); name one with --start"
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a document, (n,) int32, `start` first."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.concatenate([np.array([self.start], np.int32), *(self.ids(stretch) for stretch in stretches(raw))])

    def ids(self, text: bytes) -> np.ndarray:
        """Ids of a stretch from within a document, (n,) int32, without `start`; byte-level ones of any bytes, others
        of UTF-8."""
        try:
            return self._text_ids(text.decode("utf-8"))
        except UnicodeDecodeError:
            if len(self._byte_ids) < 256:
                return self._text_ids(text.decode("utf-8", errors="replace"))
        parts = [np.zeros(0, np.int32)]
        for part in _SURROGATES.split(text.decode("utf-8", errors="surrogateescape")):
            if part and "\udc80" <= part[0] <= "\udcff":
                parts.append(np.array([self._byte_ids[ord(character) - 0xDC00] for character in part], np.int32))
            else:
                parts.append(self._text_ids(part))
        return np.concatenate(parts)

    def _text_ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out and bytes that are not UTF-8 show as the replacement character."""
        if self._pieces is None:
            return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; special tokens are left out."""
        if self._pieces is None:
            return self.decode(ids).encode("utf-8")
        return b"".join([self._pieces[int(number)] for number in ids])


def _is_byte_level(facts: dict[str, Any]) -> bool:
    """Whether a tokenizer.json writes bytes as characters of GPT-2's alphabet."""
    return '"ByteLevel"' in json.dumps([facts.get("pre_tokenizer"), facts.get("decoder")])


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable characters of Latin-1 stand for themselves, the others for 256, 257, ... in
    order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_pieces(vocabulary: dict[str, int], added: dict[str, bool], size: int) -> list[bytes]:
    alphabet = _byte_alphabet()
    pieces = [b""] * size
    for token, number in vocabulary.items():
        if token in added:
            pieces[number] = b"" if added[token] else token.encode("utf-8")
        else:
            pieces[number] = b"".join(
                bytes([alphabet[character]]) if character in alphabet else character.encode("utf-8")
                for character in token
            )
    return pieces


def _text_pieces(vocabulary: dict[str, int], added: dict[str, bool], size: int) -> list[bytes]:
    pieces = [b""] * size
    for token, number in vocabulary.items():
        byte = _BYTE_PIECE.fullmatch(token)
        if added.get(token):
            continue
        pieces[number] = (
            bytes([int(byte[1], 16)]) if byte else token.removeprefix("##").replace("▁", " ").encode("utf-8")
        )
    return pieces


def train_bpe(texts: Iterator[str], size: int) -> str:
    """A byte-level BPE fitted to texts (Sennrich et al. 2016; on bytes as GPT-2): its tokenizer.json.

    The vocabulary has all 256 bytes and `START_TOKEN`, so no text is unknown. Equal texts give an equal file. It has
    fewer than `size` entries when the texts have too few pairs to join.
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
