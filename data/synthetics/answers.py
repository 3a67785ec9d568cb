"""A prompt with the answer that should follow it, as a batch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.data.batch import Batch


def answered(
    prompt: Int[Array, "b t"],
    answer: Int[Array, "b p"],
    weights: Float[Array, "b p"] | None = None,
    groups: Int[Array, "b p"] | None = None,
) -> Batch:
    """Returns a prompt and all of its answer but the last token; from the prompt's last token on each place is labelled
    with the token of the answer that follows it, as in generation. Tokens and labels are int32."""
    tokens = jnp.concatenate([prompt, answer[:, :-1]], axis=1).astype(jnp.int32)
    positions = jnp.broadcast_to(prompt.shape[1] - 1 + jnp.arange(answer.shape[1], dtype=jnp.int32), answer.shape)
    weights = jnp.ones(answer.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    groups = None if groups is None else jnp.broadcast_to(groups, answer.shape).astype(jnp.int32)
    return Batch(tokens, answer.astype(jnp.int32), positions, weights, groups=groups)
