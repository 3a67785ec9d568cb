"""Calls that the kernels' walks do not know, as calls that they do: one decay; erasing from the decayed state, with the
key that is written; a scale other than 0.

The undecayed state S_{t-1} read by e is the decayed one read by e exp(-g). That factor is bounded: decays stop at
`STRONGEST_DECAY` a token, of which nothing is left beside what fp32 resolves (at walks.STRONGEST_CHANNEL_DECAY a
channel, as for all kernels). Every product that holds it holds exp(g) too, so that none is larger or less exact than
with e alone.

A key u apart takes two tokens in place of one: the first decays and erases with u, the second writes v under k and is
read by q. A decay per head beside one of the state's columns is added to it. Gradients divide by the scale, so at 0
queries of 0 take its place.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY
from recollect.pallas_kernels.linear_recurrence.xla import by_channel

STRONGEST_DECAY = -30.0

Run = Callable[..., tuple[jax.Array, jax.Array | None]]


def reduced(
    run: Run, q, k, v, *, value_log_decay=None, erase_read=None, erase_write=None, erase_before_decay=False, **given
) -> tuple[jax.Array, jax.Array | None]:
    """The front door's call by `run`, an implementation of it without erase_write, erase_before_decay and a scale of
    0."""
    if given["scale"] == 0:
        q, given["scale"] = jnp.zeros_like(q), 1.0
    if erase_read is not None and erase_before_decay and given["log_decay"] is not None:
        erase_read, given["log_decay"] = _of_decayed(erase_read, given["log_decay"], given["segment_ids"])
    if value_log_decay is not None:
        g = 0 if given["log_decay"] is None else by_channel(given["log_decay"], jnp.float32)
        given |= {"log_decay": None, "value_log_decay": value_log_decay.astype(jnp.float32) + g}
    if erase_write is None:
        return run(q, k, v, erase_read=erase_read, **given)
    return _in_two_tokens(run, q, k, v, erase_read, erase_write, given)


def _of_decayed(e, log_decay, segment_ids):
    strongest = STRONGEST_CHANNEL_DECAY if log_decay.ndim == 4 else STRONGEST_DECAY
    # Not `maximum`, whose gradient is halved where both are equal, here and once more in by_walks: parts that cancel
    # would not.
    g = jnp.where(log_decay > strongest, log_decay, strongest).astype(jnp.float32)
    wide, exponent = e.astype(jnp.float32), -by_channel(g, jnp.float32)
    if segment_ids is not None:
        # Before the product: what padding holds, NaN included, must not reach a gradient.
        real = (segment_ids != 0)[:, :, None, None]
        wide, exponent = jnp.where(real, wide, 0), jnp.where(real, exponent, 0)
    return (wide * jnp.exp(exponent)).astype(e.dtype), g


def _in_two_tokens(run: Run, q, k, v, e, u, given):
    b, t, h, _ = v.shape

    def pairs(first, second):
        first = jnp.zeros_like(second) if first is None else first
        second = jnp.zeros_like(first) if second is None else second
        return jnp.stack([first, second], axis=2).reshape(b, 2 * t, *first.shape[2:])

    given = dict(given)
    g, strength, segments = (given[name] for name in ("log_decay", "write_strength", "segment_ids"))
    if g is not None:
        given["log_decay"] = pairs(jnp.broadcast_to(g, (b, t, h)) if g.ndim == 1 else g, None)
    if strength is not None:
        given["write_strength"] = pairs(None, strength)
    if segments is not None:
        given["segment_ids"] = pairs(segments, segments)
    k = jnp.repeat(k, h // k.shape[2], axis=2)
    o, state = run(pairs(None, q), pairs(u.astype(k.dtype), k), pairs(None, v), erase_read=pairs(e, None), **given)
    return o[:, 1::2], state
