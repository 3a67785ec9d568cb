"""The running maximum by which exponential gates are kept in range."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.segments import document_starts

NEVER = -1e30
"""Stands for minus infinity, whose differences are not numbers."""


def running_maximum(
    log_decay: Float[Array, "b t h"],
    log_input: Float[Array, "b t h"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b h"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
) -> tuple[tuple[Float[Array, "b t h"], Float[Array, "b t h"]], Float[Array, "b h"] | None]:
    """Returns m_t = max(log_decay_t + m_{t-1}, log_input_t) before and after each token, and the last one.

    A document, and a stream, starts from m = 0. Padding leaves m as it is. The scan is associative: log2(t) steps.
    """
    b, _, h = log_decay.shape
    before = jnp.zeros((b, h), log_decay.dtype) if initial_state is None else initial_state
    if segment_ids is not None:
        real = (segment_ids != 0)[..., None]
        starts = document_starts(segment_ids, initial_segment)[..., None]
        log_input = jnp.where(real, jnp.where(starts, jnp.maximum(log_decay, log_input), log_input), NEVER)
        log_decay = jnp.where(real, jnp.where(starts, NEVER, log_decay), 0)

    def combine(early, late):
        return early[0] + late[0], jnp.maximum(early[1] + late[0], late[1])

    decays, maxima = jax.lax.associative_scan(combine, (log_decay, log_input), axis=1)
    after = jnp.maximum(decays + before[:, None], maxima)
    previous_maxima = jnp.concatenate([before[:, None], after[:, :-1]], axis=1)
    return (previous_maxima, after), after[:, -1] if return_state else None
