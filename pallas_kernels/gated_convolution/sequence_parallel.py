"""Convolutions whose tokens are split over devices. A short convolution needs the last few inputs before a part, which
are the state it starts from. A long one runs on whole sequences, each device on its share of the channels: two
exchanges of all activations, which is less than gathering them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.dispatch import SEQUENCE
from recollect.pallas_kernels.sharding import Dimensions, over_sequence

SHORT_DIMENSIONS: dict[str, Dimensions] = {
    "x": "b t h",
    "taps": "k h",
    "bias": "h",
    "in_gate": "b t h",
    "out_gate": "b t h",
    "initial_state": "b s h",
    "segment_ids": "b t",
    "initial_segment": "b",
}
"""Letters of the dimensions of a short convolution's arrays, by which a mesh splits them: channels go by the letter of
heads."""


def short_over_devices(
    run: Callable[..., tuple[jax.Array, jax.Array | None]], arrays: Mapping[str, jax.Array | None]
) -> jax.Array:
    """Returns the short convolution's outputs from a zero state, tokens split over the ambient mesh's axis sequence.

    Args:
      run: the public function, its settings bound.
      arrays: those of its arguments that are arrays, without an initial state.
    """

    def part(x, taps, bias, in_gate, out_gate, segment_ids):
        arrays = {"in_gate": in_gate, "out_gate": out_gate, "segment_ids": segment_ids}
        past = taps.shape[0] - 1
        if not past:
            return run(x, taps, bias, **arrays)[0]
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        inputs = x if segment_ids is None else jnp.where((ids != 0)[..., None], x, 0)
        state, segment = sequence_collectives.last_inputs(inputs.astype(jnp.float32), ids, past)
        if in_gate is not None:
            gates = in_gate if segment_ids is None else jnp.where((ids != 0)[..., None], in_gate, 0)
            state = state * sequence_collectives.last_inputs(gates.astype(jnp.float32), ids, past)[0]
        return run(
            x, taps, bias, **arrays, initial_state=state, initial_segment=None if segment_ids is None else segment
        )[0]

    return over_sequence(part, {name: SHORT_DIMENSIONS[name] for name in arrays}, "b t h")(**arrays)


def long_over_devices(
    run: Callable[..., jax.Array], x: jax.Array, filter: jax.Array, segment_ids: jax.Array | None
) -> jax.Array:
    """Returns filter * x by `run(x, filter, segment_ids)` on whole sequences, tokens split over the ambient mesh's axis
    sequence; (b, t, d) as run's."""

    def part(x, filter, segment_ids):
        d, n = x.shape[2], sequence_collectives.parts()
        x, filter = (jnp.pad(y, ((0, 0),) * (y.ndim - 1) + ((0, -d % n),)) for y in (x, filter))
        share = filter.shape[1] // n
        filter = jax.lax.dynamic_slice_in_dim(filter, jax.lax.axis_index(SEQUENCE) * share, share, axis=1)
        whole = None if segment_ids is None else sequence_collectives.gathered(segment_ids)
        return sequence_collectives.split_tokens(run(sequence_collectives.split_channels(x), filter, whole))[:, :, :d]

    return over_sequence(part, {"x": "b t h", "filter": "k h", "segment_ids": "b t"}, "b t h")(x, filter, segment_ids)
