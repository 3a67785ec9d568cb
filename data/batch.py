"""The batch that a training step takes, and the config that every data set derives from."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.configuration import Config, UserError

if TYPE_CHECKING:
    from recollect.data.text.rows.by_number import GlobalBatches
    from recollect.data.tokenizers import Tokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
      tokens: token ids.
      targets: ids that the model should predict at the labelled positions.
      target_positions: the labelled positions; None when every position is labelled (p = t).
      weights: weight of each target in loss and accuracy; 0 leaves it out.
      segments: document of each token, 0 for padding; None for one document without padding.
      source: token ids of the second sequence that an encoder reads; None for models without one.
      source_segments: as `segments`, of the source; a document reads the source's tokens of its own number.
      groups: kind of each target, by which a task reports accuracy (`SyntheticTask.breakdown`); None: one kind.
      token_types, fields, vectors: what else is known of the tokens, as in the model's `Context`; None: plain tokens.
    """

    tokens: Int[Array, "b t"]
    targets: Int[Array, "b p"]
    target_positions: Int[Array, "b p"] | None
    weights: Float[Array, "b p"]
    segments: Int[Array, "b t"] | None = None
    groups: Int[Array, "b p"] | None = None
    token_types: Int[Array, "b t"] | None = None
    fields: dict[str, Int[Array, "b t"]] | None = None
    vectors: Float[Array, "b t e"] | None = None
    source: Int[Array, "b s"] | None = None
    source_segments: Int[Array, "b s"] | None = None


@chz.chz(typecheck=True)
class DataConfig(Config):
    """Base of all data sets' configs: everything that training and evaluation ask of a data set.

    There are two kinds. Synthetic tasks (`synthetics/task.py`) are `made_on_device`: they draw their batches inside the
    compiled step, by slices. All others give batches of NumPy arrays by number (`batches`, `evaluation_batches`).
    """

    made_on_device: ClassVar[bool] = False
    """Whether batches are a pure function of (seed, step), drawn inside the step; then none can be skipped."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of token ids."""

    @property
    @abc.abstractmethod
    def longest(self) -> int:
        """Tokens of the longest sequence in training or evaluation."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the sequences in training and evaluation, ascending."""
        return [self.longest]

    @property
    def tokens_per_example(self) -> float:
        """Mean tokens of a training example."""
        return float(self.longest)

    def prepare(self) -> None:
        """Downloads or builds what the data needs, if anything.

        Raises:
          UserError: it can't be had.
        """

    def corpus_digest(self) -> str | None:
        """Returns the sha256 of the corpus, hexadecimal; None where no corpus is read."""
        return None

    def result_entries(self) -> dict[str, Any]:
        """Returns the entries of result.json that describe the data, JSON-ready."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the data, JSON-ready: "vocabulary", the number of token ids, and of text
        "tokenizer" and "corpus"."""
        return {"vocabulary": self.vocabulary}

    def files(self) -> dict[str, bytes]:
        """Returns the files, by name, that a checkpoint keeps of the data: the tokenizer's."""
        return {}

    def batch_shapes(self, batch_size: int) -> Batch:
        """Returns the longest training batch, as shapes and dtypes."""
        tokens: Any = jax.ShapeDtypeStruct((batch_size, self.longest), jnp.int32)
        weights: Any = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
        return Batch(tokens, tokens, None, weights, tokens)

    # Data that the host reads.

    def batches(self, seed: int, batch_size: int) -> GlobalBatches:
        """Returns the training batches by number; equal for equal arguments."""
        raise NotImplementedError

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields held-out batches of `batch_size` rows in one fixed order; the text is the same whatever their size."""
        raise NotImplementedError

    # Text.

    def open_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer; None where tokens are not text."""
        return None

    def prompt(self, seed: int, length: int = 64) -> list[int]:
        """Returns the first tokens of a held-out document, at most `length`; raises UserError where none are text."""
        raise UserError(f"{type(self).__name__} has no text to prompt a model with")

    def encode(self, text: str | bytes) -> list[int]:
        """Returns the token ids of the beginning of a document; raises UserError where tokens are not text."""
        raise UserError(f"{type(self).__name__} is not text: there is no tokenizer to encode a prompt with")

    def decode(self, tokens: Any) -> str:
        """Returns the text of token ids, up to where another document begins; raises UserError where they are none."""
        raise UserError(f"{type(self).__name__} is not text: there is no tokenizer to decode tokens with")

    def continuation(self, prompt: Any, tokens: Any) -> str:
        """Returns the text of token ids as it reads after those of `prompt`; raises UserError where they are none."""
        return self.decode(tokens)

    def continued(self, prompt: str, tokens: Any) -> str:
        """Returns a prompt and the text of the token ids that follow it; raises UserError where they are none."""
        return prompt + self.continuation(self.encode(prompt), tokens)
