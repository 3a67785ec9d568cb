"""What the loss takes of a model (training/loss.py), for programs that mix its tokens in another way."""

from __future__ import annotations

import abc
import dataclasses

import jax
from jaxtyping import Array, Int

from recollect.layers.mixer import Context, MixerOutput
from recollect.models.language_model import LanguageModel, LanguageModelModule


@dataclasses.dataclass(frozen=True)
class ScoredModule(abc.ABC):
    """A model's config and head, with a `hidden` of its own."""

    module: LanguageModelModule

    @property
    def config(self) -> LanguageModel:
        """The model's config."""
        return self.module.config

    def head_kernel(self) -> jax.Array:
        """Returns the head's matrix."""
        return self.module.head_kernel()

    @abc.abstractmethod
    def hidden(self, tokens: Int[Array, "b t"], context: Context) -> MixerOutput:
        """Returns the hidden vectors of the tokens, as `LanguageModelModule.hidden` does."""
