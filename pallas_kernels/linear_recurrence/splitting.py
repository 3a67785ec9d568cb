"""Long sequences split along time: pieces run side by side, and their states are combined afterwards.

A piece is linear in the state S it starts from: its outputs and its last state are those from S = 0 plus what S adds,

    o_i = o_i(0) + R_i S,        S_end = S_end(0) + T S.

Nothing erased, R_i = exp(G_i) q_i and T = exp(G) with G the decay since the piece began. Where something is erased, both come from
the recurrence itself, run with the identity beside the state: k more columns of values, all 0. So a piece needs no neighbour
until its own work is done; then one pass over the pieces, of a state each, gives what every piece starts from. On devices that
each hold a piece the same two steps apply (`over_devices`): they exchange one state and one T a piece, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import exchange
from pallas_kernels.linear_recurrence.xla import by_channel, carried
from pallas_kernels.sharding import Dimensions, over_sequence

Recurrence = Callable[..., tuple[jax.Array, jax.Array | None]]


def in_pieces(
    run: Recurrence,
    pieces: int,
    q,
    k,
    v,
    *,
    log_decay=None,
    write_strength=None,
    erase_read=None,
    erase_write=None,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """The front door's call, t in `pieces` equal pieces that `run` (an implementation of it) takes as rows of a larger batch."""
    b, t, h, value_dim = v.shape
    key_dim = q.shape[3]
    rows = {"q": q, "k": k, "v": v, "write_strength": write_strength, "erase_read": erase_read, "erase_write": erase_write}
    if log_decay is not None:
        rows["log_decay"] = jnp.broadcast_to(log_decay, (b, t, h)) if log_decay.ndim == 1 else log_decay
    rows = {name: _folded(x, pieces) for name, x in rows.items() if x is not None}
    length = rows["v"].shape[1]
    segments = first = None
    if segment_ids is not None:
        first = jnp.zeros(b, segment_ids.dtype) if initial_segment is None else initial_segment.astype(segment_ids.dtype)
        last = carried(_padded(segment_ids, pieces), first).reshape(b, pieces, length)[:, :, -1]
        first = jnp.concatenate([first[:, None], last[:, :-1]], axis=1).reshape(b * pieces)
        segments = _folded(segment_ids, pieces)
    own = jnp.zeros((b, pieces, h, key_dim, value_dim), jnp.float32)
    if initial_state is not None:
        own = own.at[:, 0].set(initial_state.astype(jnp.float32))
    own = own.reshape(b * pieces, h, key_dim, value_dim)
    o, readers, states, keeps = _apart(run, rows, own, segments, first, scale, chunk_size)
    states, keeps = (x.reshape(b, pieces, *x.shape[1:]) for x in (states, keeps))
    before, after = entering(states, keeps)
    before = before.reshape(b * pieces, h, key_dim, value_dim)
    o = o + _read(readers, before, v.dtype)
    return o.reshape(b, pieces * length, h, value_dim)[:, :t], after if return_state else None


def over_devices(
    run: Recurrence, arrays: Mapping[str, jax.Array | None], dimensions: Mapping[str, Dimensions], scale: float, chunk_size: int | None
) -> jax.Array:
    """The front door's outputs from a zero state, tokens split over the ambient mesh's axis sequence.

    Args:
      run: the front door.
      arrays: those of its arguments that are arrays, without an initial state; dimensions: their letters.
    """

    def part(q, k, v, log_decay, value_log_decay, write_strength, erase_read, erase_write, segment_ids):
        rows = {"q": q, "k": k, "v": v, "write_strength": write_strength, "erase_read": erase_read, "erase_write": erase_write}
        if log_decay is not None:
            rows["log_decay"] = jnp.broadcast_to(log_decay, v.shape[:3]) if log_decay.ndim == 1 else log_decay
        columns, kept = _column_decay(value_log_decay, segment_ids)
        if value_log_decay is not None:
            rows["value_log_decay"] = value_log_decay
        rows = {name: x for name, x in rows.items() if x is not None}
        first = None if segment_ids is None else exchange.segment_before(segment_ids)
        o, readers, states, keeps = _apart(run, rows, None, segment_ids, first, scale, chunk_size)
        states = entering(exchange.stacked(states), exchange.stacked(keeps), None if kept is None else exchange.stacked(kept))[0]
        return o + _read(readers, exchange.own(states), v.dtype, columns)

    return over_sequence(part, {name: dimensions[name] for name in arrays}, "b t h v")(**arrays)


def _apart(run: Recurrence, rows, own, segments, first, scale, chunk_size):
    """Pieces by themselves: outputs, what reads a state that enters (b, t, h, k), last states, and what is left of an entering state.

    Args:
      rows: q, k, v and what else the call has, by name. own: the states they start from; None is 0.
      segments, first: (b, t) and, of the token before, (b,); or None.
    """
    rows = dict(rows)
    q, k, v = (rows.pop(name) for name in ("q", "k", "v"))
    (b, t, h, value_dim), key_dim = v.shape, q.shape[3]
    shared = {"scale": scale, "segment_ids": segments, "initial_segment": first, "return_state": True, "chunk_size": chunk_size}
    if "erase_read" not in rows:
        o, states = run(q, k, v, initial_state=own, **rows, **shared)
        readers, keeps = _decayed(q, rows.get("log_decay"), scale, h, segments, first)
        return o, readers, states, keeps
    if "write_strength" in rows and rows["write_strength"].ndim == 4:
        ones = jnp.ones((b, t, h, key_dim), rows["write_strength"].dtype)
        rows["write_strength"] = jnp.concatenate([rows["write_strength"], ones], axis=3)
    own = jnp.zeros((b, h, key_dim, value_dim), jnp.float32) if own is None else own
    identity = jnp.broadcast_to(jnp.eye(key_dim), (b, h, key_dim, key_dim))
    v = jnp.concatenate([v, jnp.zeros((b, t, h, key_dim), v.dtype)], axis=3)
    o, states = run(q, k, v, initial_state=jnp.concatenate([own, identity], axis=3), **rows, **shared)
    assert states is not None
    return o[..., :value_dim], o[..., value_dim:], states[..., :value_dim], states[..., value_dim:]


def _column_decay(value_log_decay, segments):
    """exp of the log decay of columns since the part began (b, t, h, v), and to its end (b, h, 1, v); None without one."""
    if value_log_decay is None:
        return None, None
    c = value_log_decay.astype(jnp.float32)
    total = jnp.cumsum(c if segments is None else jnp.where((segments != 0)[:, :, None, None], c, 0), axis=1)
    return jnp.exp(total), jnp.exp(total[:, -1])[:, :, None]


def _read(readers: jax.Array, states: jax.Array, dtype, columns: jax.Array | None = None) -> jax.Array:
    o = jnp.einsum("bthk,bhkv->bthv", readers.astype(jnp.float32), states)
    return (o if columns is None else columns * o).astype(dtype)


def entering(states: jax.Array, keeps: jax.Array, columns: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """What each piece adds to the state it starts from, and the last state.

    Args:
      states: (b, n, h, k, v), each piece's last state run by itself; the first piece from the true state, the others from 0.
      keeps: what of an entering state is left, (b, n, h, k, 1) factors or (b, n, h, k, k) matrices.
      columns: (b, n, h, 1, v) factors of the state's columns besides; None is ones.

    Returns:
      (b, n, h, k, v) states that enter each piece, 0 for the first, which had its own; and the last piece's true last state.
    """

    def step(state, piece):
        own, keep, column = piece
        kept = keep * state if keep.shape[-1] == 1 else jnp.einsum("bhkl,bhlv->bhkv", keep, state)
        return own + (kept if column is None else column * kept), state

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (states, keeps, columns))
    after, before = jax.lax.scan(step, jnp.zeros_like(states[:, 0]), xs)
    return jnp.moveaxis(before, 0, 1), after


def _decayed(q, log_decay, scale, heads, segments, first):
    """exp(G) scale q (b, t, h, k), and exp of the whole piece's G (b, h, k or 1, 1); 0 where another document lies between."""
    q = jnp.repeat(q.astype(jnp.float32), heads // q.shape[2], axis=2) * scale
    keeps = jnp.ones((q.shape[0], heads, 1, 1), jnp.float32)
    real = None if segments is None else (segments != 0)[:, :, None, None]
    if log_decay is not None:
        g = by_channel(log_decay, jnp.float32)
        total = jnp.cumsum(g if real is None else jnp.where(real, g, 0), axis=1)
        q, keeps = q * jnp.exp(total), jnp.exp(total[:, -1])[..., None]
    if segments is not None:
        reached = carried(segments, first) == first[:, None]
        q = jnp.where(reached[:, :, None, None] & real, q, 0)
        keeps = jnp.where(reached[:, -1, None, None, None], keeps, 0)
    return q, keeps


def _padded(x, pieces):
    # Zeros at the end are padding: without segments they write and decay nothing, with segments they are segment 0.
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % pieces), *((0, 0) for _ in x.shape[2:])))


def _folded(x, pieces):
    x = _padded(x, pieces)
    return x.reshape(x.shape[0] * pieces, x.shape[1] // pieces, *x.shape[2:])
