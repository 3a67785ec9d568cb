"""Text as rows of tokens: the config `Text`, its training batches by number and its held-out batches.

Documents come tokenised from `data/text/preparation/reader.py`, `data/text/rows/` makes rows of them in one of
four ways, and `data/text/rows/by_number.py` makes every global batch a function of (seed, number). Held-out
rows are always packed into `length` tokens (`data/text/held_out.py`), however the training rows are made.

A training document ends with a target of its own (data/text/ended_documents.py), so that generated text knows its end.

Targets of an evaluation are all tokens of the held-out text that it measures but the opening ones: each exactly once,
predicted from what stands before it in its row. Which text that is depends on `held_out_bytes` alone: every method,
tokenizer and batch size is measured on the same bytes, so numbers compare at equal `held_out_bytes`, text and `length`;
a longer `length` gives longer contexts and with them lower numbers.

Easy to get wrong: the last batch of an evaluation is filled with padding (segment 0, weight 0).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import chz
import numpy as np

from recollect.configuration import UserError, at_least, requires
from recollect.configuration.machine import expanded
from recollect.data.batch import Batch, DataConfig
from recollect.data.text.ended_documents import EndedDocuments
from recollect.data.text.held_out import HeldOutText, MeasuredBatch
from recollect.data.text.rows import GlobalBatches, Packed, RowPlan, Sequences
from recollect.data.text.token_files import (
    IdTokenizer,
    MappedDocuments,
    TokenCorpus,
    are_token_files,
    open_token_files,
)
from recollect.data.tokenizers import TOKENIZER_FILE, Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from recollect.data.text.preparation.reader import Prepared

_tokenizer = functools.lru_cache(maxsize=4)(open_tokenizer)


@chz.chz(typecheck=True)
class Text(DataConfig):
    """Next-token prediction on text.

    Attributes:
      source: "stdlib" (the interpreter's own source code), a file or folder of text, "tfds:NAME", a folder that
        `main.py prepare` made, or token ids: a .npy or .bin file, or a folder with train.bin (token_files.py).
      tokenizer: "bytes", "bpe:SIZE" (trained on the source), or the path of a tokenizer.json; None: the prepared
        folder's own, else bytes.
      start_token: the token of a tokenizer.json that opens documents, if it has an unusual name.
      length: tokens per row; of the longest rows where they differ.
      sequences: how documents become rows: Packed, Chunked, Streams or Decomposed.
      shuffle: rows in an order drawn anew each epoch, or as planned.
      held_out_bytes: bytes of held-out text that an evaluation measures, spread over it; None: all of it.
      token_type: of ids in .bin files.
      end_token: the id that ends each document of token files; None: a file is one document.
      vocabulary_size: number of ids of token files; None: the tokenizer's, else the largest id in them and one.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    start_token: str | None = None
    length: int = chz.field(default=512, validator=at_least(2))
    sequences: Sequences = Packed()
    shuffle: bool = True
    held_out_bytes: int | None = chz.field(
        default=200_000, validator=requires(lambda value: value > 0, "must be at least 1, or None for all of it")
    )
    token_type: Literal["uint16", "uint32"] = "uint16"
    end_token: int | None = chz.field(default=None, validator=at_least(0))
    vocabulary_size: int | None = chz.field(default=None, validator=at_least(1))

    RETIRED: ClassVar[dict[str, str]] = {
        "held_out_batches": "an evaluation's size no longer depends on the batch; give data.held_out_bytes, bytes of "
        "text (None: all), about batches x run.batch_size x data.length for a byte model"
    }

    @chz.validate
    def _possible(self) -> None:
        if not self.source or self.source == "tfds:":
            raise UserError(f"source={self.source!r}: must be stdlib, a path, or tfds:NAME")
        self.sequences.check(self.length)

    def are_ids(self) -> bool:
        """Returns whether the source is files of token ids."""
        return are_token_files(self.source)

    @property
    def vocabulary(self) -> int:
        return self.vocabulary_size or self.open_tokenizer().vocabulary

    @property
    def longest(self) -> int:
        return self.length

    def open_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, without preparing anything unless it is trained on the source ("bpe:SIZE").

        Raises:
          UserError: there is no such tokenizer; or none is named, and the source is not there to tell its own.
        """
        trained = (self.tokenizer or "").startswith("bpe:")
        if trained or self.are_ids() or self.is_prepared() or (not self.tokenizer and self.is_gone()):
            return self.prepared().tokenizer
        return _tokenizer(self.tokenizer or "bytes", self.start_token)

    def is_prepared(self) -> bool:
        """Returns whether the source is a folder that `main.py prepare` made."""
        from recollect.data.text.preparation.manifest import is_prepared

        return is_prepared(expanded(self.source, f"source={self.source!r}"))

    def is_gone(self) -> bool:
        """Returns whether the source is a path at which nothing is."""
        named = self.source == "stdlib" or self.source.startswith("tfds:")
        return not named and not os.path.exists(os.path.expanduser(self.source))

    def prepared(self) -> Prepared | TokenCorpus:
        """Returns the tokenised documents, prepared on first use.

        Raises:
          UserError: they can't be had; see `recollect.data.text.preparation.reader.open_prepared`.
        """
        of_ids = (self.token_type, self.end_token, self.vocabulary_size)
        if self.are_ids():
            return _token_files(self.source, *of_ids, self.tokenizer, self.start_token)
        if of_ids != ("uint16", None, None):
            raise UserError(
                f"data.source={self.source!r}: is no file of token ids (.npy, .bin), which alone have token_type, "
                "end_token and vocabulary_size"
            )
        # Importing TFDS takes a second, which experiments on recall tasks needn't pay.
        from recollect.configuration.machine import cache_folder

        return _prepared(self.source, self.tokenizer, self.start_token, str(cache_folder()))

    def prepare(self) -> None:
        self.prepared()

    def corpus_digest(self) -> str:
        return self.prepared().digest

    def identity(self) -> dict[str, Any]:
        """Returns "vocabulary"; "tokenizer", where it is known: name, digest and start_token; "corpus": source and
        digest."""
        prepared = self.prepared()
        tokenizer, corpus = prepared.tokenizer, {"source": self.source, "digest": prepared.digest}
        known = {} if isinstance(tokenizer, IdTokenizer) else {"tokenizer": tokenizer.identity()}
        return {"vocabulary": self.vocabulary, **known, "corpus": corpus}

    def files(self) -> dict[str, bytes]:
        file = self.prepared().tokenizer.file
        return {} if file is None else {TOKENIZER_FILE: file}

    def result_entries(self) -> dict[str, Any]:
        """Returns `corpus`: source, digest, tokenizer, and documents, tokens and bytes of both splits."""
        return {"corpus": self.prepared().describe()}

    def batches(self, seed: int, batch_size: int) -> GlobalBatches:
        """Returns the training batches by number; equal for equal arguments.

        Raises:
          UserError: the corpus can't be had or gives no rows.
        """
        documents = _ended(self.prepared())
        return GlobalBatches(
            documents,
            _rows(documents, self.sequences, self.length, seed),
            self.sequences,
            length=self.length,
            batch_size=batch_size,
            seed=seed,
            shuffle=self.shuffle,
        )

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the held-out text in batches of `batch_size` rows, in one fixed order."""
        return (measured.batch for measured in self.measured_batches(batch_size))

    def measured_batches(self, batch_size: int) -> Iterator[MeasuredBatch]:
        """Yields the same, each with the bytes and documents of its targets."""
        return _held_out(self.prepared().held_out, self.held_out_bytes).batches(self.length, batch_size)

    def prompt(self, seed: int, length: int = 64) -> list[int]:
        """Returns the first tokens of a held-out document, the opening one included, at most `length`."""
        documents = self.prepared().held_out
        number = seed % len(documents)
        return documents.tokens(number, 0, min(length, int(documents.lengths[number]))).tolist()

    def encode(self, text: str | bytes) -> list[int]:
        """Returns the tokens of the beginning of a document."""
        return self.open_tokenizer().encode(text).tolist()

    def decode(self, tokens: Any) -> str:
        """Returns the text of tokens, up to where another document begins."""
        return self.open_tokenizer().decode_document(np.asarray(tokens).reshape(-1))

    def continuation(self, prompt: Any, tokens: Any) -> str:
        return self.open_tokenizer().continuation(prompt, tokens)

    def continued(self, prompt: str, tokens: Any) -> str:
        return self.open_tokenizer().continued(prompt, tokens)


@functools.lru_cache(maxsize=4)
def _prepared(source: str, tokenizer: str | None, start: str | None, cache: str) -> Prepared:
    from recollect.data.text.preparation.reader import open_prepared

    return open_prepared(source, tokenizer, start)


_held_out = functools.lru_cache(maxsize=4)(HeldOutText)


_token_files = functools.lru_cache(maxsize=4)(open_token_files)


@functools.lru_cache(maxsize=4)
def _ended(prepared: Prepared | TokenCorpus) -> EndedDocuments | MappedDocuments:
    if isinstance(prepared, TokenCorpus):
        return prepared.train
    return EndedDocuments(prepared.train, prepared.tokenizer.start)


@functools.lru_cache(maxsize=4)
def _rows(documents: EndedDocuments | MappedDocuments, sequences: Sequences, length: int, seed: int) -> RowPlan:
    return sequences.plan(documents.lengths, length, seed)
