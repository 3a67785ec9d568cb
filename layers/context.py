"""What a mixer may know about the tokens of one call beside their vectors, and of a second sequence that it reads."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a mixer may know about the tokens of one call beside their vectors. Change one with `dataclasses.replace`.

    Attributes:
      positions: index of the token within its document, landmarks counted. None: counted up from the state (or from 0).
      segments: document of the token; 0 is padding. Tokens of a document are contiguous, and no document returns after
        it ended. None: one document, no padding.
      token_types: ORDINARY, LANDMARK, PERCEPT or PREFIX (pallas_kernels/masks.py). None: all ordinary.
      token_ids: of the vocabulary, -1 for landmarks. None: not known, as where a mixer is called alone.
      key: of dropout; None in evaluation.
      fields: what else masks read of the tokens, by name: ring, row, column, part.
      source: the sequence that cross mixers read; None for a model without them.
      vectors: continuous inputs of the tokens of type PERCEPT, which a model's projector takes; layers see None.
    """

    positions: Int[Array, "b t"] | None = None
    segments: Int[Array, "b t"] | None = None
    token_types: Int[Array, "b t"] | None = None
    token_ids: Int[Array, "b t"] | None = None
    key: Key[Array, ""] | None = None
    fields: dict[str, Int[Array, "b t"]] | None = None
    source: Source | None = None
    vectors: Float[Array, "b t e"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """A second sequence, which cross mixers read: a document of the stream reads the source's tokens of its own segment
    number.

    Attributes:
      hidden: vectors of its tokens, made by the model's encoder from `context.token_ids`; None until then.
      context: what is known of its tokens, as of those of the stream.
    """

    hidden: Float[Array, "b s d"] | None = None
    context: Context = Context()
