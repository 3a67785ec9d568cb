"""A state per document of packed rows, on a backend that knows one per row: documents are moved apart, so that each
chunk holds tokens of one document only, and a scan over chunks loads a document's state where it begins.

A row of t tokens with at most n documents takes (t + n (c - 1)) / c chunks of c tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, map_tokens, without_padding
from recollect.pallas_kernels.segments import document_numbers


def recurrence_by_documents(
    run: Callable[..., Any], inputs: Recurrence, *, return_state: bool, chunk_size: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns `linear_recurrence` of inputs whose initial state is (b, n, h, k, v). run: the backend, for one chunk
    that has a state before it."""
    states, segment_ids = inputs.initial_state, inputs.segment_ids
    (b, n), t, c = states.shape[:2], segment_ids.shape[1], chunk_size
    rows, real, numbers = jnp.arange(b)[:, None], segment_ids != 0, document_numbers(segment_ids)
    belongs = real[..., None] & (numbers[..., None] == jnp.arange(n))
    index = jnp.max(jnp.where(belongs, jnp.cumsum(belongs, axis=1) - 1, 0), axis=2)
    counts = -(-jnp.sum(belongs, axis=1) // c)  # chunks per document (b, n)
    ends = jnp.cumsum(counts, axis=1)
    firsts = ends - counts
    chunks = (t + n * (c - 1)) // c
    slots = c * jnp.take_along_axis(firsts, jnp.minimum(numbers, n - 1), axis=1) + index
    slots = jnp.where(real & (numbers < n), slots, chunks * c)
    source = jnp.full((b, chunks * c), t).at[rows, slots].set(jnp.arange(t), mode="drop")
    document = jnp.minimum(jnp.sum(ends[:, None] <= jnp.arange(chunks)[:, None], axis=2), n - 1)
    begins = jnp.arange(chunks) == jnp.take_along_axis(firsts, document, axis=1)

    def apart(x: jax.Array) -> jax.Array:
        x = x.at[rows, source].get(mode="fill", fill_value=0)
        return jnp.moveaxis(x.reshape(b, chunks, c, *x.shape[2:]), 1, 0)

    plain = dataclasses.replace(without_padding(inputs), initial_state=None, segment_ids=None, initial_segment=None)
    arrays = map_tokens(plain, apart)

    def one_chunk(state: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        tokens, begins, document = x
        state = jnp.where(begins[:, None, None, None], states[jnp.arange(b), document].astype(state.dtype), state)
        o, state = run(dataclasses.replace(tokens, initial_state=state), return_state=True, chunk_size=c)
        return state, (o, state)

    dtype = jnp.promote_types(states.dtype, jnp.promote_types(inputs.v.dtype, jnp.float32))
    body = jax.checkpoint(one_chunk, prevent_cse=False)
    _, (o, after) = jax.lax.scan(body, jnp.zeros(states[:, 0].shape, dtype), (arrays, begins.T, document.T))
    o = jnp.moveaxis(o, 0, 1).reshape(b, chunks * c, *o.shape[3:]).at[rows, slots].get(mode="fill", fill_value=0)
    o = jnp.where((real & (numbers >= n))[..., None, None], jnp.nan, o)
    if not return_state:
        return o, None
    last = jnp.moveaxis(after, 0, 1)[rows, jnp.maximum(ends - 1, 0)]
    return o, jnp.where((counts > 0)[..., None, None, None], last, states)
