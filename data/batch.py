"""What a training step sees of any data set."""

from __future__ import annotations

import dataclasses

import chz
import jax

from recollect.configuration import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
      tokens: (b, t) int32.
      targets: (b, p) int32, what the model should say at the labelled positions.
      target_positions: (b, p) int32, the labelled positions; None when every position is labelled (p = t).
      weights: (b, p) float32, weight of each target in loss and accuracy; 0 leaves it out.
      segments: (b, t) int32, document of each token, 0 padding; None for one document without padding.
    """

    tokens: jax.Array
    targets: jax.Array
    target_positions: jax.Array | None
    weights: jax.Array
    segments: jax.Array | None = None


@chz.chz(typecheck=True)
class DataConfig(Config):
    """Base of all data sets' configs. `longest` is the length of the longest sequence in training and evaluation."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Fetches or builds what the data needs, if anything.

        Raises:
          UserError: it can't be had.
        """

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence the data gives, in training or evaluation."""
        raise NotImplementedError
