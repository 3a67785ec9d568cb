"""Landmarks as words: the loss of the published fine-tuning of LLaMA (Mohtashami & Jaggi 2023, section 4.2; in their
code a landmark is one more token of the vocabulary, whose labels are as any other's).

The token that fills a block predicts the landmark, and the landmark's output predicts the token after it; elsewhere a
landmark is a wrong answer. In the paper's training from scratch no output predicts landmarks, and the token before one
predicts the token after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.token_sums import LayerSums, Means
from recollect.models.landmarks import Layout
from recollect.pallas_kernels.linear_cross_entropy import linear_cross_entropy
from recollect.pallas_kernels.masks import LANDMARK


def with_loss(model: Any, out: MixerOutput, layout: Layout, context: Context) -> MixerOutput:
    """Returns the stack's output with one more loss, "landmarks": the sum of the cross-entropy of landmarks where they
    come next, over the number of ordinary tokens (a mean over landmarks too would be (block + 1) / block smaller).

    Args:
      model: the LanguageModelModule.
      layout: whose slots are at landmarks where these come next.
      context: of the longer sequence.
    """
    assert context.token_types is not None
    b, longer = context.token_types.shape
    followed = jnp.take_along_axis(context.token_types, layout.slots, axis=1) == LANDMARK
    place = jnp.sort(jnp.where(followed, layout.slots - 1, longer), axis=1)[:, : longer - layout.slots.shape[1]]
    weights = (place < longer).astype(jnp.float32)
    hidden = jnp.take_along_axis(out.hidden, jnp.minimum(place, longer - 1)[..., None], axis=1)
    kernel = model.head_kernel()
    targets = jnp.full(place.shape, kernel.shape[1] - 1, jnp.int32)
    total = linear_cross_entropy(model.final_norm(hidden), kernel, targets, weights).total
    real = jnp.ones((b, longer), bool) if context.segments is None else context.segments != 0
    tokens = jnp.sum(real & (context.token_types != LANDMARK), dtype=jnp.float32)
    means = Means({"landmarks": total[None]}, {}, tokens[None])
    sums = LayerSums((*(out.sums.layers if out.sums is not None else ()), means))
    losses, metrics = sums.formed()
    return dataclasses.replace(out, losses=losses, metrics=metrics, sums=sums)
