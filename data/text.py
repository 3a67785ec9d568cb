"""Text as packed rows of bytes: the config `Text`, its training iterator and its held-out batches.

Documents come from `data/corpora.py`, are cut and packed by `data/packing.py`, and are shuffled, repeated, batched and read ahead by
Grain. Tokens are bytes plus one that opens a document (vocabulary 257).

Bits per byte: cross-entropy in nats / ln 2, averaged over targets of weight 1. Targets are the bytes of held-out documents, the
first one included (predicted from the opening token), save those that begin a later piece of a long document: they have no
context in their row, so they are no targets (at most one byte in `length`). Every method is measured on the same targets, so numbers compare
at equal corpus digest and equal `length`; a longer `length` gives longer contexts and with them lower numbers.

Easy to get wrong:
- Grain's process prefetch needs parsed absl flags and a main guard; batches here cost under a millisecond, so threads do.
- The held-out rows of one evaluation are the same whatever the batch size; the last batch is filled with padding (segment 0, weight 0).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import chz
import numpy as np

from configuration import UserError
from data.batch import Batch, DataConfig
from data.packing import PackedRows, next_token_targets
from data.tokenizers import START, ByteTokenizer

if TYPE_CHECKING:
    from data.corpora import Corpus
    from data.ngrams import Bigram, NgramTable

_READERS, _BATCHES_AHEAD = 2, 8
_ENDLESS = 2**48
_HELD_OUT_ORDER = 0


@chz.chz(typecheck=True)
class Text(DataConfig):
    """Next-byte prediction on text.

    Attributes:
      source: "stdlib" (the interpreter's own source code), a text file, .jsonl file or folder, or "tfds:NAME".
      length: tokens a row.
      tokenizer: "bytes" is the only one so far.
      shuffle: rows in an order drawn anew each epoch, or as packed.
      held_out_batches: most batches an evaluation takes, unless it asks for another number.
    """

    source: str = "stdlib"
    length: int = 512
    tokenizer: Literal["bytes"] = "bytes"
    shuffle: bool = True
    held_out_batches: int = 50

    @chz.validate
    def _ranges(self) -> None:
        if not self.source or self.source == "tfds:":
            raise UserError(f"source={self.source!r}: must be stdlib, a path, or tfds:NAME")
        if self.length < 2:
            raise UserError(f"length={self.length}: must be at least 2")
        if self.held_out_batches < 1:
            raise UserError(f"held_out_batches={self.held_out_batches}: must be at least 1")

    @property
    def vocabulary(self) -> int:
        return ByteTokenizer.vocabulary

    @property
    def longest(self) -> int:
        return self.length

    def corpus(self) -> Corpus:
        """The corpus, prepared on first use.

        Raises:
          UserError: it can't be had; see `data.corpora.open_corpus`.
        """
        # Importing TFDS takes a second, which experiments on recall tasks needn't pay.
        from data.corpora import cache_folder

        return _corpus(self.source, str(cache_folder()))

    def prepare(self) -> None:
        self.corpus()

    def describe(self) -> dict[str, Any]:
        """Source, digest, and documents and bytes of both splits."""
        return self.corpus().describe()

    def train_rows(self) -> PackedRows:
        """The training rows by number."""
        return _rows(self.corpus(), "train", self.length)

    def train_iterator(self, seed: int, batch_size: int) -> TextIterator:
        """Endless training batches of numpy arrays; equal for equal arguments, and it continues from a saved state.

        Raises:
          UserError: the corpus can't be had.
        """
        import grain

        rows = grain.MapDataset.source(self.train_rows()).seed(seed % 2**32)
        if self.shuffle:
            rows = rows.shuffle()
        # Longer than any run; Grain's own endless repeat overflows its length when batched by one.
        batches = rows.repeat(_ENDLESS // len(rows)).batch(batch_size).map(_batch)
        options = grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_BATCHES_AHEAD)
        return TextIterator(iter(batches.to_iter_dataset(options)), self.corpus().digest)

    def evaluation_batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Held-out batches, in one fixed order spread over the documents; at most `max_batches` (None: `held_out_batches`)."""
        rows = _rows(self.corpus(), "held_out", self.length)
        order = np.random.default_rng(_HELD_OUT_ORDER).permutation(len(rows))
        limit = self.held_out_batches if max_batches is None else max_batches
        for begin in range(0, min(len(order), limit * batch_size), batch_size):
            taken = [rows[row] for row in order[begin : begin + batch_size]]
            empty = {"tokens": np.zeros(self.length, np.int32), "segments": np.zeros(self.length, np.int32)}
            taken += [empty] * (batch_size - len(taken))
            yield _batch({name: np.stack([row[name] for row in taken]) for name in empty})

    def bigram(self) -> Bigram:
        """Byte pairs of the training documents: the baseline every model should beat."""
        return _bigram(self.corpus())

    def ngram_table(self) -> NgramTable:
        """The training documents' most frequent next byte by the 7 bytes before it."""
        return _ngram_table(self.corpus())

    def prompt(self, seed: int, length: int = 64) -> list[int]:
        """The opening token and the first bytes of a held-out document, `length` tokens in all at most."""
        documents = self.corpus().held_out
        return self.encode(documents[seed % len(documents)][: length - 1])

    def encode(self, text: str | bytes) -> list[int]:
        """Tokens of the beginning of a document."""
        return ByteTokenizer().encode(text).tolist()

    def decode(self, tokens: Any) -> str:
        """Text of tokens, up to where another document begins."""
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        end = ids.index(START, 1) if START in ids[1:] else len(ids)
        return ByteTokenizer().decode(ids[:end])


class TextIterator:
    """Training batches; `get_state` is JSON-ready, and names the corpus so that no run continues on another one."""

    def __init__(self, batches: Any, digest: str):
        self._batches = batches
        self._digest = digest

    def __iter__(self) -> TextIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"corpus": self._digest, "grain": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch before which `state` was taken.

        Raises:
          UserError: the state belongs to another corpus.
        """
        if state["corpus"] != self._digest:
            raise UserError(f"the checkpoint was trained on corpus {state['corpus'][:12]}, and the source now holds {self._digest[:12]}")
        self._batches.set_state(state["grain"])


def _batch(rows: dict[str, Any]) -> Batch:
    targets: Any
    weights: Any
    targets, weights = next_token_targets(rows["tokens"], rows["segments"])
    return Batch(tokens=rows["tokens"], targets=targets, target_positions=None, weights=weights, segments=rows["segments"])


@functools.lru_cache(maxsize=4)
def _corpus(source: str, cache: str) -> Corpus:
    from data.corpora import open_corpus

    return open_corpus(source)


@functools.lru_cache(maxsize=4)
def _rows(corpus: Corpus, split: str, length: int) -> PackedRows:
    documents = corpus.train if split == "train" else corpus.held_out
    return PackedRows(documents, documents.byte_lengths + 1, length)


@functools.lru_cache(maxsize=2)
def _bigram(corpus: Corpus) -> Bigram:
    from data.ngrams import Bigram

    return Bigram.fit(corpus.train)


@functools.lru_cache(maxsize=2)
def _ngram_table(corpus: Corpus) -> NgramTable:
    from data.ngrams import NgramTable

    return NgramTable.fit(corpus.train)
