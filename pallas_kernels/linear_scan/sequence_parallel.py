"""Scans whose tokens are split over devices: each part is a map h -> A h + B of the state that enters it; devices
exchange one A and one B per part, whatever its length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.sharding import over_sequence

DIMENSIONS = {"a": "b t h", "b": "b t h", "segment_ids": "b t"}
"""Letters of the arrays' dimensions, by which a mesh splits them: channels go by the letter of heads."""


def over_devices(run: Callable[..., Any], a: jax.Array, b: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Returns the scan's states from a zero state, tokens split over the ambient mesh's axis sequence. run: the public
    function."""

    def part(a: jax.Array, b: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        segments: dict[str, Any] = {"segment_ids": segment_ids}
        if segment_ids is not None:
            segments["initial_segment"] = sequence_collectives.previous_segment(segment_ids)
        zeros = jnp.zeros_like(a[:, 0])
        added = run(a, b, initial_state=zeros, return_state=True, **segments)[1]
        kept = run(a, jnp.zeros_like(b), initial_state=jnp.ones_like(zeros), return_state=True, **segments)[1]
        kept, added = (jnp.moveaxis(sequence_collectives.stacked(x), 1, 0) for x in (kept, added))
        state = jnp.zeros_like(added[0])
        entering = [state]
        for n in range(added.shape[0] - 1):
            state = kept[n] * state + added[n]
            entering.append(state)
        state = sequence_collectives.this_part(jnp.stack(entering, axis=1))
        return run(a, b, initial_state=state, **segments)[0]

    return over_sequence(part, DIMENSIONS, "b t h")(a=a, b=b, segment_ids=segment_ids)
