"""Tokens split over devices. What a part adds to the state does not depend on the state it starts from, so each part
first sums that up alone; one state per part is exchanged, and the operation then runs from the state that enters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.chunking import chunked
from recollect.pallas_kernels.linear_recurrence.recurrence import (
    DIMENSIONS,
    Recurrence,
    repeat_heads,
    without_padding,
)
from recollect.pallas_kernels.linear_recurrence.sequence_parallel import entering_states
from recollect.pallas_kernels.sharding import over_sequence
from recollect.pallas_kernels.taylor_attention.features import count, packed

CHUNK = 256
"""Tokens whose features exist at once."""


def over_devices(
    run: Callable[[Recurrence], tuple[jax.Array, jax.Array | None]], inputs: Recurrence, normalise: bool
) -> jax.Array:
    """Returns the outputs from a zero state, tokens split over the ambient mesh's axis sequence; `run` is one part's
    operation."""

    def part(inputs: Recurrence) -> jax.Array:
        if inputs.segment_ids is not None:
            before = sequence_collectives.previous_segment(inputs.segment_ids)
            inputs = dataclasses.replace(inputs, initial_segment=before)
        states, keeps = jax.tree.map(sequence_collectives.stacked, state_from_zero(inputs, normalise))
        state = sequence_collectives.this_part(entering_states(states, keeps))
        return run(dataclasses.replace(inputs, initial_state=state))[0]

    inputs = dataclasses.replace(inputs, initial_segment=None)
    return over_sequence(part, {"inputs": DIMENSIONS}, "b t h v")(inputs)


def state_from_zero(inputs: Recurrence, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Returns a part's last state (b, h, features, v + 1 or v) fp32 from a state of zeros, and whether it keeps an
    entering one, (b, 1, 1, 1) of 0 or 1.

    Features are made again for the gradient: those of more than one chunk never exist at once.
    """
    b, t, h, _ = inputs.v.shape
    dtype, first = jnp.promote_types(inputs.v.dtype, jnp.float32), inputs.initial_segment
    if normalise:
        ones = jnp.ones_like(inputs.v[..., :1])
        inputs = dataclasses.replace(inputs, v=jnp.concatenate([inputs.v, ones], axis=-1))
    inputs = without_padding(inputs)
    v, keeps = inputs.v, jnp.ones((b, 1, 1, 1), dtype)
    if inputs.segment_ids is not None:
        last = inputs.segment_ids[:, -1]
        v = jnp.where((inputs.segment_ids == last[:, None])[:, :, None, None], v, 0)
        keeps = (last == first).astype(dtype)[:, None, None, None]
    # A key of zeros has a feature that is 1; its value is zero.
    chunks = [jnp.moveaxis(chunked(x, min(CHUNK, t)), 1, 0) for x in (repeat_heads(inputs.k, h), v)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        k, v = chunk
        return state + jnp.einsum("bthf,bthv->bhfv", packed(k.astype(dtype)), v.astype(dtype)), None

    state = jnp.zeros((b, h, count(inputs.k.shape[3]), v.shape[3]), dtype)
    return jax.lax.scan(step, state, chunks)[0], keeps
