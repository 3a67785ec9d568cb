"""Long sequences split along time: what each piece adds to the state is found first, for all pieces side by side; then
all run side by side from the states that truly enter them.

A piece's last state is linear in the state S it starts from,

    S_end = S_end(0) + T S.

Nothing erased, S_end(0) is one product, sum_j exp(G_end - G_j) k_j v_j^T, and T = exp(G) with G the piece's whole log
decay. Where something
is erased, both come from the recurrence itself, run with the identity beside the state: k more columns of values, all
0.

`over_devices` does this over devices that each hold a piece: they exchange one state and one T per piece, whatever its
length. GPU kernels do it inside of one device (gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import to_end
from recollect.pallas_kernels.linear_recurrence.xla import by_channel, carried
from recollect.pallas_kernels.sharding import Dimensions, over_sequence

Recurrence = Callable[..., tuple[jax.Array, jax.Array | None]]


def over_devices(
    run: Recurrence,
    arrays: Mapping[str, jax.Array | None],
    dimensions: Mapping[str, Dimensions],
    scale: float,
    chunk_size: int | None,
) -> jax.Array:
    """The front door's outputs from a zero state, tokens split over the ambient mesh's axis sequence.

    Args:
      run: the front door.
      arrays: those of its arguments that are arrays, without an initial state; dimensions: their letters.
    """

    def part(q, k, v, log_decay, value_log_decay, write_strength, erase_read, erase_write, segment_ids):
        rows = {
            "q": q,
            "k": k,
            "v": v,
            "write_strength": write_strength,
            "erase_read": erase_read,
            "erase_write": erase_write,
        }
        if log_decay is not None:
            rows["log_decay"] = jnp.broadcast_to(log_decay, v.shape[:3]) if log_decay.ndim == 1 else log_decay
        if value_log_decay is not None:
            rows["value_log_decay"] = value_log_decay
        rows = {name: x for name, x in rows.items() if x is not None}
        shared = {"segment_ids": segment_ids, "chunk_size": chunk_size}
        shared["initial_segment"] = None if segment_ids is None else sequence_collectives.segment_before(segment_ids)
        if erase_read is None:
            states, keeps, columns = added(rows, segment_ids, shared["initial_segment"])
        else:
            (states, keeps), columns = through_erasing(run, rows, shared), None
        columns = None if columns is None else sequence_collectives.stacked(columns)
        states = sequence_collectives.own(
            entering(sequence_collectives.stacked(states), sequence_collectives.stacked(keeps), columns=columns)
        )
        return run(**rows, **shared, scale=scale, initial_state=states)[0]

    return over_sequence(part, {name: dimensions[name] for name in arrays}, "b t h v")(**arrays)


def added(rows, segments, first) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A piece's last state (b, h, k, v) from S = 0, nothing erased, and what it leaves of S: (b, h or 1, k or 1, 1)
    factors, and where columns decay (b, h, 1, v) factors, else None.

    Args:
      segments, first: (b, t) and, of the token before, (b,); or None.
    """
    k, v, g, c = rows["k"], rows["v"], rows.get("log_decay"), rows.get("value_log_decay")
    wide = jnp.promote_types(v.dtype, jnp.float32)
    real = None if segments is None else (segments != 0)[:, :, None, None]
    weight = jnp.ones((1, 1, 1, 1), wide)
    keeps = jnp.ones((v.shape[0], 1, 1, 1), wide)
    strength = by_channel(rows["write_strength"], wide) if "write_strength" in rows else None
    g, c = (None if x is None else by_channel(x, wide) for x in (g, c))
    if real is not None:
        # Before products: what padding holds, NaN included, must not reach a gradient either.
        k, v, g, c, strength = (None if x is None else jnp.where(real, x, 0) for x in (k, v, g, c, strength))
    if strength is not None:
        v = (strength * v).astype(v.dtype)
    columns = None
    if c is not None:
        v = (jnp.exp(to_end(c[:, None])[:, 0]) * v).astype(v.dtype)
        columns = jnp.exp(jnp.sum(c, axis=1))[:, :, None]
    if g is not None:
        weight, keeps = jnp.exp(to_end(g[:, None])[:, 0]), jnp.exp(jnp.sum(g, axis=1))[..., None]
    if real is not None:
        last = carried(segments, first)[:, -1]
        weight = jnp.where(real & (segments == last[:, None])[:, :, None, None], weight, 0)
        keeps = jnp.where((last == first)[:, None, None, None], keeps, 0)
    k = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    state = jnp.einsum("bthk,bthv->bhkv", (weight * k).astype(v.dtype), v, preferred_element_type=wide)
    return state, keeps, columns


def through_erasing(run: Recurrence, rows, shared) -> tuple[jax.Array, jax.Array]:
    """A piece's last state (b, h, k, v) from S = 0, and T (b, h, k, k)."""
    b, t, h, value_dim = rows["v"].shape
    key_dim = rows["k"].shape[3]
    rows = dict(rows, v=jnp.concatenate([rows["v"], jnp.zeros((b, t, h, key_dim), rows["v"].dtype)], axis=3))
    if rows.get("write_strength", rows["v"][..., 0]).ndim == 4:
        ones = jnp.ones((b, t, h, key_dim), rows["write_strength"].dtype)
        rows["write_strength"] = jnp.concatenate([rows["write_strength"], ones], axis=3)
    nothing = jnp.zeros((b, h, key_dim, value_dim), jnp.float32)
    identity = jnp.broadcast_to(jnp.eye(key_dim), (b, h, key_dim, key_dim))
    states = run(**rows, **shared, initial_state=jnp.concatenate([nothing, identity], axis=3), return_state=True)[1]
    assert states is not None
    return states[..., :value_dim], states[..., value_dim:]


def entering(
    states: jax.Array, keeps: jax.Array, first: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array:
    """The states that enter n pieces, and the one after the last.

    Args:
      states: (b, n, h, k, v), each piece's last state when it starts from 0.
      keeps: what a piece leaves of an entering state: factors that broadcast over states, or T, (b, n, h, k, k).
      first: (b, h, k, v), what enters the first piece; None is 0.
      columns: (b, n, h, 1, v) factors of the state's columns besides; None is ones.

    Returns:
      (b, n + 1, h, k, v).
    """

    def step(state, piece):
        own, keep, column = piece
        kept = keep * state if 1 in keep.shape[-2:] else jnp.einsum("bhkl,bhlv->bhkv", keep, state, precision="highest")
        return own + (kept if column is None else column * kept), state

    first = jnp.zeros_like(states[:, 0]) if first is None else first.astype(states.dtype)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (states, keeps, columns))
    # A few pieces without a loop: on a GPU its turns are launches.
    after, before = jax.lax.scan(step, first, xs, unroll=min(8, states.shape[1]))
    return jnp.concatenate([jnp.moveaxis(before, 0, 1), after[:, None]], axis=1)
