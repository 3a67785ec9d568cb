"""What training minimises and evaluation reports: cross-entropy at labelled positions, and its z-loss."""

from __future__ import annotations

import dataclasses

import chz
import jax
import jax.numpy as jnp

from configuration import Config, UserError
from data.batch import Batch
from layers.mixer import Context
from models.language_model import LanguageModelModule, ModelOutput


@chz.chz(typecheck=True)
class Loss(Config):
    """Cross-entropy with options.

    Attributes:
      z_loss: weight of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM, Chowdhery et al. 2022, section 5: 1e-4).
    """

    z_loss: float = 0.0

    @chz.validate
    def _ranges(self) -> None:
        if not 0 <= self.z_loss < float("inf"):
            raise UserError(f"loss.z_loss={self.z_loss}: must not be negative")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """At the labelled positions of a batch.

    Attributes:
      total: () sum of weight times (loss + z_loss lse^2): what has a gradient.
      loss: (b, p) cross-entropy in nats.
      lse: (b, p) log-sum-exp of the logits.
      correct: (b, p) bool.
    """

    total: jax.Array
    loss: jax.Array
    lse: jax.Array
    correct: jax.Array


def losses(
    module: LanguageModelModule, batch: Batch, weights: jax.Array, config: Loss, key: jax.Array | None = None
) -> tuple[Losses, ModelOutput]:
    """Runs the model on a batch. Only labelled positions are projected to the vocabulary.

    Args:
      weights: (b, p) of the targets.
      key: for dropout; None in evaluation.
    """
    out = module.hidden(batch.tokens, Context(segments=batch.segments), key)
    hidden = out.hidden
    if batch.target_positions is not None:
        hidden = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
    logits = module.logits(hidden)
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    lse = jax.nn.logsumexp(logits, axis=-1)
    loss = lse - chosen
    # Right when no other logit is as large: argmax without its cost on a CPU, and ties (a collapsed model) count as wrong.
    correct = jnp.sum(logits >= chosen[..., None], axis=-1) == 1
    penalised = loss + config.z_loss * lse * lse if config.z_loss else loss
    return Losses(jnp.sum(penalised * weights), loss, lse, correct), out
