"""The loss: cross-entropy at labelled positions, and its z-loss."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp

from recollect.configuration import Config, UserError
from recollect.data.batch import Batch
from recollect.layers.context import Context, Source
from recollect.layers.mixer import MixerOutput
from recollect.models.language_model import LanguageModelModule
from recollect.pallas_kernels.linear_cross_entropy import CrossEntropy, linear_cross_entropy


@chz.chz(typecheck=True)
class Loss(Config):
    """Cross-entropy with options.

    Attributes:
      z_loss: weight of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM, Chowdhery et al.
        2022, section 5: 1e-4).
      chunk: targets whose logits are in memory at once; None: all where they are few, else as many as fit 256 MiB
        (pallas_kernels/linear_cross_entropy).
    """

    z_loss: float = 0.0
    chunk: int | None = None

    @chz.validate
    def _ranges(self) -> None:
        if not 0 <= self.z_loss < float("inf"):
            raise UserError(f"loss.z_loss={self.z_loss}: must not be negative")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"loss.chunk={self.chunk}: must be at least 1, or None to choose by size")


def losses(
    module: LanguageModelModule, batch: Batch, weights: jax.Array, config: Loss, key: jax.Array | None = None
) -> tuple[CrossEntropy, MixerOutput]:
    """Runs the model on a batch; returns the losses and the model's output. Only labelled positions are projected to
    the vocabulary. `weights` (b, p) are the targets'; `key` is for dropout, None in evaluation."""
    if batch.target_positions is None and module.config.sees_targets:
        raise UserError(
            "every token is labelled with the next, which a model with causal=False sees: label some tokens"
        )
    out = module.hidden(batch.tokens, context_of(batch, key))
    hidden = out.hidden
    if batch.target_positions is not None:
        hidden = jnp.take_along_axis(hidden, batch.target_positions[..., None], axis=1)
    entropy = linear_cross_entropy(
        hidden, module.head_kernel(), batch.targets, weights, z_loss=config.z_loss, chunk=config.chunk
    )
    return entropy, out


def context_of(batch: Batch, key: jax.Array | None = None) -> Context:
    """Returns what a batch states of its tokens and of its source's; `key` is for dropout."""
    known = {name: getattr(batch, name) for name in ("segments", "token_types", "fields", "vectors")}
    of_source = Context(token_ids=batch.source, segments=batch.source_segments)
    return Context(**known, key=key, source=None if batch.source is None else Source(context=of_source))
