"""Long sequences split along time: what each part adds to the state is computed first, for all parts at once; then all
run at once from the states that truly enter them.

A part's last state is linear in the state S it starts from,

    S_end = S_end(0) + T S.

Nothing erased, S_end(0) is one product, sum_j exp(G_end - G_j) k_j v_j^T, and T = exp(G) with G the part's whole log
decay. Where something is erased, both come from the recurrence itself, run with the identity next to the state: k more
columns of values, all 0.

`over_devices` does this over devices that each hold a part: they exchange one state and one T per part, whatever its
length. GPU kernels do it inside one device (gpu.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import to_end
from recollect.pallas_kernels.linear_recurrence.recurrence import (
    DIMENSIONS,
    Recurrence,
    by_channel,
    repeat_heads,
    with_decay_per_token,
    with_strength,
    without_padding,
)
from recollect.pallas_kernels.sharding import over_sequence

Run = Callable[..., tuple[jax.Array, jax.Array | None]]


def over_devices(run: Run, inputs: Recurrence) -> jax.Array:
    """Returns the outputs from a zero state, tokens split over the ambient mesh's axis sequence.

    Args:
      run: (inputs, return_state=) -> outputs and last state, of one part.
    """

    def part(inputs: Recurrence) -> jax.Array:
        if inputs.segment_ids is not None:
            before = sequence_collectives.previous_segment(inputs.segment_ids)
            inputs = dataclasses.replace(inputs, initial_segment=before)
        if inputs.erase_read is None:
            states, keeps, columns = state_from_zero(inputs)
        else:
            (states, keeps), columns = state_and_transition(run, inputs), None
        states, keeps, columns = jax.tree.map(sequence_collectives.stacked, (states, keeps, columns))
        state = sequence_collectives.this_part(entering_states(states, keeps, columns=columns))
        return run(dataclasses.replace(inputs, initial_state=state))[0]

    inputs = dataclasses.replace(inputs, initial_segment=None)
    return over_sequence(part, {"inputs": DIMENSIONS}, "b t h v")(inputs)


def state_from_zero(inputs: Recurrence) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns a part's last state (b, h, k, v) from S = 0, nothing erased, and what it leaves of S: (b, h or 1, k or 1, 1)
    factors, and where columns decay (b, h, 1, v) factors, else None."""
    first, dtype = inputs.initial_segment, jnp.promote_types(inputs.v.dtype, jnp.float32)
    inputs = with_strength(with_decay_per_token(without_padding(inputs)))
    v, segments = inputs.v, inputs.segment_ids
    weight = jnp.ones((1, 1, 1, 1), dtype)
    keeps = jnp.ones((v.shape[0], 1, 1, 1), dtype)
    columns = None
    if inputs.value_log_decay is not None:
        c = inputs.value_log_decay.astype(dtype)
        v = (jnp.exp(to_end(c[:, None])[:, 0]) * v).astype(v.dtype)
        columns = jnp.exp(jnp.sum(c, axis=1))[:, :, None]
    if inputs.log_decay is not None:
        g = by_channel(inputs.log_decay, dtype)
        weight, keeps = jnp.exp(to_end(g[:, None])[:, 0]), jnp.exp(jnp.sum(g, axis=1))[..., None]
    if segments is not None:
        last = segments[:, -1]
        weight = jnp.where((segments == last[:, None])[:, :, None, None], weight, 0)
        keeps = jnp.where((last == first)[:, None, None, None], keeps, 0)
    k = repeat_heads(inputs.k, v.shape[2])
    state = jnp.einsum("bthk,bthv->bhkv", (weight * k).astype(v.dtype), v, preferred_element_type=dtype)
    return state, keeps, columns


def state_and_transition(run: Run, inputs: Recurrence) -> tuple[jax.Array, jax.Array]:
    """Returns a part's last state (b, h, k, v) from S = 0, and T (b, h, k, k)."""
    b, t, h, value_dim = inputs.v.shape
    key_dim, strength = inputs.k.shape[3], inputs.write_strength

    def widened(x: jax.Array, value: float) -> jax.Array:
        return jnp.concatenate([x, jnp.full((b, t, h, key_dim), value, x.dtype)], axis=3)

    identity = jnp.broadcast_to(jnp.eye(key_dim), (b, h, key_dim, key_dim))
    state = jnp.concatenate([jnp.zeros((b, h, key_dim, value_dim), jnp.float32), identity], axis=3)
    inputs = dataclasses.replace(
        inputs,
        v=widened(inputs.v, 0),
        write_strength=widened(strength, 1) if strength is not None and strength.ndim == 4 else strength,
        initial_state=state,
    )
    last = run(inputs, return_state=True)[1]
    assert last is not None
    return last[..., :value_dim], last[..., value_dim:]


def entering_states(
    states: jax.Array, keeps: jax.Array, first: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array:
    """Returns the states that enter n parts, and the one after the last: (b, n + 1, h, k, v).

    Args:
      states: (b, n, h, k, v), each part's last state when it starts from 0.
      keeps: what a part leaves of an entering state: factors that broadcast over states, or T, (b, n, h, k, k).
      first: (b, h, k, v), what enters the first part; None is 0.
      columns: (b, n, h, 1, v) more factors, of the state's columns; None is ones.
    """

    def step(state, part):
        added, keep, column = part
        kept = keep * state if 1 in keep.shape[-2:] else jnp.einsum("bhkl,bhlv->bhkv", keep, state, precision="highest")
        return added + (kept if column is None else column * kept), state

    first = jnp.zeros_like(states[:, 0]) if first is None else first.astype(states.dtype)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (states, keeps, columns))
    # A few parts without a loop: on a GPU its iterations are launches.
    after, before = jax.lax.scan(step, first, xs, unroll=min(8, states.shape[1]))
    return jnp.concatenate([jnp.moveaxis(before, 0, 1), after[:, None]], axis=1)
