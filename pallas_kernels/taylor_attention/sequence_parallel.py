"""Tokens split over devices. What a part adds to the state does not depend on the state it starts from, so each part
first sums that up alone; one state a part is exchanged, and the operation then runs from the state that enters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.linear_recurrence.sequence_parallel import entering_states
from recollect.pallas_kernels.segments import carry_segments
from recollect.pallas_kernels.sharding import Dimensions, over_sequence
from recollect.pallas_kernels.taylor_attention.features import count, packed

CHUNK = 256
"""Tokens whose features exist at once."""


def over_devices(
    run: Callable[..., tuple[jax.Array, jax.Array | None]],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    dimensions: Mapping[str, Dimensions],
    normalise: bool,
) -> jax.Array:
    """The front door's outputs from a zero state, tokens split over the ambient mesh's axis sequence.

    Args:
      run: the front door, its settings bound.
      dimensions: letters of the arguments.
    """

    def part(q, k, v, segment_ids):
        b = v.shape[0]
        first = last = None
        if segment_ids is not None:
            first = sequence_collectives.segment_before(segment_ids)
            last = carry_segments(segment_ids, first)[:, -1]
        own = written(k, v, segment_ids, last, normalise)
        keeps = jnp.ones((b, 1, 1, 1), own.dtype)
        if first is not None:
            keeps = jnp.where(last == first, 1, 0).astype(own.dtype)[:, None, None, None]
        states = entering_states(sequence_collectives.stacked(own), sequence_collectives.stacked(keeps))
        return run(
            q, k, v, initial_state=sequence_collectives.own(states), segment_ids=segment_ids, initial_segment=first
        )[0]

    names = ("q", "k", "v", "segment_ids")
    return over_sequence(part, {name: dimensions[name] for name in names}, "b t h v")(q, k, v, segment_ids)


def written(
    k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, last: jax.Array | None, normalise: bool
) -> jax.Array:
    """What tokens add to a state, of the document `last` (b,) alone where there are several: (b, h, features, v + 1 or
    v) fp32.

    Features are made again for the gradient: those of more than one chunk never exist at once.
    """
    b, t, h, _ = v.shape
    wide = jnp.promote_types(v.dtype, jnp.float32)
    if normalise:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if segment_ids is not None and last is not None:
        k = jnp.where((segment_ids != 0)[:, :, None, None], k, 0)
        v = jnp.where(((segment_ids == last[:, None]) & (segment_ids != 0))[:, :, None, None], v, 0)
    k = jnp.repeat(k, h // k.shape[2], axis=2)
    size = min(CHUNK, t)
    # A key of zeros has a feature that is 1; its value is zero.
    chunks = [jnp.moveaxis(_chunks(x, size), 1, 0) for x in (k, v)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        k, v = chunk
        return state + jnp.einsum("bthf,bthv->bhfv", packed(k.astype(wide)), v.astype(wide)), None

    return jax.lax.scan(step, jnp.zeros((b, h, count(k.shape[3]), v.shape[3]), wide), chunks)[0]


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """(b, t, ...) to (b, n, size, ...), zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])
