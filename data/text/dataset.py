"""Text as rows of tokens: the config `Text`, its training batches by number and its held-out batches.

Documents come tokenised from `data/text/preparation/reader.py`, `data/text/rows/` makes rows of them in one of
three ways, and `data/text/rows/by_number.py` makes every global batch a function of (seed, number). Held-out
rows are always packed whole documents of `length` tokens, however the training rows are made, so that runs compare.

A training document ends with a target of its own (data/text/ended_documents.py), so that generated text knows its end.

Targets of an evaluation are all tokens of held-out documents but the opening ones: each exactly once, predicted from
what stands before it in its row. Every method is measured on the same targets, so numbers compare at equal corpus
digest and equal `length`; a longer `length` gives longer contexts and with them lower numbers.

Easy to get wrong: the held-out rows of one evaluation are the same whatever the batch size; the last batch is filled
with padding (segment 0, weight 0).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import chz
import numpy as np
from jaxtyping import Int

from recollect.configuration import UserError, at_least
from recollect.configuration.user_paths import expanded
from recollect.data.batch import Batch, DataConfig
from recollect.data.text.ended_documents import EndedDocuments
from recollect.data.text.rows import GlobalBatches, Packed, RowPlan, Sequences, read_rows
from recollect.data.text.rows.base import Span
from recollect.data.text.rows.stable_random import permutation
from recollect.data.tokenizers import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from recollect.data.text.preparation.reader import Prepared, TokenDocuments

_HELD_OUT_ORDER = (0, 5)
_tokenizer = functools.lru_cache(maxsize=4)(open_tokenizer)


@chz.chz(typecheck=True)
class Text(DataConfig):
    """Next-token prediction on text.

    Attributes:
      source: "stdlib" (the interpreter's own source code), a file or folder of text, "tfds:NAME", or a folder that
        `main.py prepare` made.
      tokenizer: "bytes", "bpe:SIZE" (trained on the source), or the path of a tokenizer.json; None: the prepared
        folder's own, else bytes.
      length: tokens per row; of the longest rows where they differ.
      sequences: how documents become rows: Packed, Chunked or Decomposed.
      shuffle: rows in an order drawn anew each epoch, or as planned.
      held_out_batches: most batches of an evaluation, unless it asks for another number.
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    length: int = chz.field(default=512, validator=at_least(2))
    sequences: Sequences = Packed()
    shuffle: bool = True
    held_out_batches: int = chz.field(default=50, validator=at_least(1))

    @chz.validate
    def _possible(self) -> None:
        if not self.source or self.source == "tfds:":
            raise UserError(f"source={self.source!r}: must be stdlib, a path, or tfds:NAME")
        self.sequences.check(self.length)

    @property
    def vocabulary(self) -> int:
        return self.open_tokenizer().vocabulary

    @property
    def longest(self) -> int:
        return self.length

    def open_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer, without preparing anything unless it is trained on the source ("bpe:SIZE").

        Raises:
          UserError: there is no such tokenizer.
        """
        from recollect.data.text.preparation.manifest import is_prepared

        if (self.tokenizer or "").startswith("bpe:") or is_prepared(expanded(self.source, f"source={self.source!r}")):
            return self.prepared().tokenizer
        return _tokenizer(self.tokenizer or "bytes")

    def prepared(self) -> Prepared:
        """Returns the tokenised documents, prepared on first use.

        Raises:
          UserError: they can't be had; see `recollect.data.text.preparation.reader.open_prepared`.
        """
        # Importing TFDS takes a second, which experiments on recall tasks needn't pay.
        from recollect.configuration.machine import cache_folder

        return _prepared(self.source, self.tokenizer, str(cache_folder()))

    def prepare(self) -> None:
        self.prepared()

    def corpus_digest(self) -> str:
        return self.prepared().digest

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

    def evaluation_batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
        """Yields held-out batches in one fixed order spread over the documents.

        Args:
          batch_size: rows per batch.
          max_batches: at most so many; None for `held_out_batches`.
        """
        documents = self.prepared().held_out
        for rows in self._held_out_rows(batch_size, max_batches):
            yield read_rows(documents, rows, batch_size, self.length)

    def evaluation_bytes(
        self, batch_size: int, max_batches: int | None = None
    ) -> Iterator[Int[np.ndarray, "batch_size length"]]:
        """Yields how many bytes of text each target stands for, for each of `evaluation_batches`; 0 without a target.

        Whatever the tokenizer, they add up to the bytes of the text.
        """
        documents = self.prepared().held_out
        for rows in self._held_out_rows(batch_size, max_batches):
            sizes = np.zeros((batch_size, self.length), np.int64)
            for place, spans in enumerate(rows):
                at = 0
                for document, start, stop in spans:
                    of_targets = documents.token_bytes(document, start + 1, stop + 1)
                    sizes[place, at : at + len(of_targets)] = of_targets
                    at += stop - start
            yield sizes

    def _held_out_rows(self, batch_size: int, max_batches: int | None) -> Iterator[list[list[Span]]]:
        """Yields the rows of each held-out batch, as spans of documents."""
        plan = _rows(self.prepared().held_out, Packed(), self.length, 0)
        limit = self.held_out_batches if max_batches is None else max_batches
        order = permutation(_HELD_OUT_ORDER, plan.counts[0])[: limit * batch_size].tolist()
        for begin in range(0, len(order), batch_size):
            yield [plan.spans(0, row) for row in order[begin : begin + batch_size]]

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
        tokenizer = self.open_tokenizer()
        ids = [int(token) for token in np.asarray(tokens).reshape(-1)]
        end = ids.index(tokenizer.start, 1) if tokenizer.start in ids[1:] else len(ids)
        return tokenizer.decode(ids[:end])

    def continuation(self, prompt: Any, tokens: Any) -> str:
        """Returns the text of tokens as it reads after those of `prompt`, up to where another document begins.

        Both are decoded together: alone, tokens that begin a word lose the space before it.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(tokens)

    def continued(self, prompt: str, tokens: Any) -> str:
        """Returns a prompt and the text of the tokens that follow it."""
        ids = self.encode(prompt)
        more = self.continuation(ids, tokens)
        # A tokenizer that drops the spaces at the end of a text writes one before the next word.
        dropped = prompt.endswith(" ") and not self.decode(ids).endswith(" ")
        return prompt + (more.removeprefix(" ") if dropped else more)


@functools.lru_cache(maxsize=4)
def _prepared(source: str, tokenizer: str | None, cache: str) -> Prepared:
    from recollect.data.text.preparation.reader import open_prepared

    return open_prepared(source, tokenizer)


@functools.lru_cache(maxsize=4)
def _ended(prepared: Prepared) -> EndedDocuments:
    return EndedDocuments(prepared.train, prepared.tokenizer.start)


@functools.lru_cache(maxsize=4)
def _rows(documents: TokenDocuments | EndedDocuments, sequences: Sequences, length: int, seed: int) -> RowPlan:
    return sequences.plan(documents.lengths, length, seed)
