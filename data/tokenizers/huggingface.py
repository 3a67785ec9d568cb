"""Tokenizers from a tokenizer.json (the format of the `tokenizers` library), and training a byte-level BPE.

Text is never matched against special tokens: a document that contains "<|endoftext|>" gets the ids of those characters.

A byte-level vocabulary (GPT-2's alphabet of 256 characters for bytes; Radford et al. 2019, section 2.2) writes any
bytes exactly, and `token_bytes` is exact. In other vocabularies (SentencePiece-like with "▁", WordPiece) the bytes of
an id are those of its token, with "▁" for a space and "<0x0A>" for one byte. That is not what the ids stand for in a
given text: unknown characters are no token's, spaces may be nobody's, and a space may be three bytes. There
`measured_ids` takes the bytes from where the library says that each token lies in the text.
"""

import functools
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from recollect.configuration import UserError
from recollect.configuration.io import first_line
from recollect.data.tokenizers.bytes import MeasuredIds, Tokenizer

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
        self.exact = self._byte_level and len(self._byte_ids) == 256 and _keeps_bytes(content)
        self.unknown = None if self._byte_level and len(self._byte_ids) == 256 else _unknown(content, vocabulary)

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

    def measured_ids(self, text: bytes) -> MeasuredIds:
        """Returns the ids of a chunk, and the bytes that each stands for: from the end of the one before to its own.

        They add up to the chunk, whatever the tokenizer adds, leaves out or does not know; what no token covers, such
        as the spaces of WordPiece, belongs to the token after it, at the end to the last one. Unknown is what becomes
        the token for the unknown, and all but white space that becomes none.
        """
        if self.exact:
            return super().measured_ids(text)
        characters = text.decode("utf-8", errors="replace")
        encoded = self._tokenizer.encode(characters, add_special_tokens=False)
        points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        widths = 1 + np.searchsorted([0x80, 0x800, 0x10000], points, side="right")  # bytes of each in UTF-8
        ids = np.array(encoded.ids, np.int32)
        offsets = np.fromiter(itertools.chain.from_iterable(encoded.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        unknown = _covered(offsets[ids == self.unknown], len(points))
        dropped = np.flatnonzero(~_covered(offsets, len(points)))
        unknown[dropped[~np.isin(points[dropped], _blank_points())]] = True
        ends = np.maximum.accumulate(offsets[:, 1])
        ends[-1:] = len(points)
        sizes = np.diff(np.concatenate([[0], np.cumsum(widths)])[ends], prepend=0).astype(np.int32)
        return MeasuredIds(ids, sizes, int(widths[unknown].sum()))

    def unknown_bytes(self, text: bytes, ids: Int[np.ndarray, " n"]) -> int:
        """Returns how many bytes of a chunk, whose ids are given, the tokenizer does not know."""
        if self.exact or (self.unknown is not None and not (ids == self.unknown).any()):
            return 0
        return self.measured_ids(text).unknown_bytes

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


def _covered(offsets: Int[np.ndarray, "n 2"], count: int) -> Bool[np.ndarray, " count"]:
    """Returns which of `count` characters lie in one of the ranges."""
    steps = [np.bincount(places, minlength=count + 1)[: count + 1] for places in offsets.T]
    return np.cumsum(steps[0] - steps[1])[:count] > 0


@functools.cache
def _blank_points() -> Int[np.ndarray, " n"]:
    """Returns the code points of white space and of control and format characters, which a tokenizer may leave out."""
    characters = map(chr, range(0x10000))
    return np.array([ord(c) for c in characters if c.isspace() or unicodedata.category(c) in ("Cc", "Cf")], np.uint32)


def _keeps_bytes(content: dict[str, Any]) -> bool:
    """Returns whether a byte-level tokenizer.json neither changes a text before it is split, nor adds a space to it."""
    prefixes = '"add_prefix_space": true' in json.dumps(content.get("pre_tokenizer"))
    return content.get("normalizer") is None and not prefixes


def _unknown(content: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """Returns the id of a tokenizer.json's token for what it does not know."""
    model = content.get("model") or {}
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else vocabulary.get(token)


def _token_bytes(token: str, byte_level: bool) -> bytes:
    """Returns the bytes that a token of the vocabulary stands for."""
    if byte_level:
        alphabet = byte_alphabet()
        return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode("utf-8") for c in token)
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.removeprefix("##").replace("▁", " ").encode("utf-8")


@functools.cache
def byte_alphabet() -> dict[str, int]:
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
