"""Calls that chunk scans do not serve, rewritten as calls that they do serve: one decay; erasing from the decayed state,
with the key that is written; a scale other than 0.

The undecayed state S_{t-1} read by e is the decayed one read by e exp(-g). That factor is bounded: decays stop at
`STRONGEST_DECAY` per token, after which nothing is left that fp32 resolves (at chunk_scan.STRONGEST_CHANNEL_DECAY per
channel, as for all kernels). Every product that holds it holds exp(g) too, so that none is larger or less exact than
with e alone.

A key u other than k takes two tokens in place of one: the first decays and erases with u, the second writes v under k
and is read by q. A decay per head next to one of the state's columns is added to it. Gradients divide by the scale, so
at 0 queries of 0 take its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY
from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, by_channel, repeat_heads
from recollect.pallas_kernels.segments import zero_padding

STRONGEST_DECAY = -30.0


def run_canonical(
    run: Callable[[Recurrence], tuple[jax.Array, jax.Array | None]], inputs: Recurrence
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `run`, which serves no erase_write, erase_before_decay, second decay or scale of 0, on any inputs."""
    if inputs.scale == 0:
        inputs = dataclasses.replace(inputs, q=jnp.zeros_like(inputs.q), scale=1.0)
    if inputs.erase_before_decay:
        if inputs.log_decay is not None:
            inputs = _erasing_the_decayed(inputs)
        inputs = dataclasses.replace(inputs, erase_before_decay=False)
    if inputs.value_log_decay is not None and inputs.log_decay is not None:
        decay = inputs.value_log_decay.astype(jnp.float32) + by_channel(inputs.log_decay, jnp.float32)
        inputs = dataclasses.replace(inputs, log_decay=None, value_log_decay=decay)
    if inputs.erase_write is None:
        return run(inputs)
    o, state = run(_in_two_tokens(inputs))
    return o[:, 1::2], state


def _erasing_the_decayed(inputs: Recurrence) -> Recurrence:
    """Inputs whose erase reads the decayed state as the given ones read the undecayed one."""
    strongest = STRONGEST_CHANNEL_DECAY if inputs.log_decay.ndim == 4 else STRONGEST_DECAY
    # Not `maximum`, whose gradient is halved where both are equal, here and once more in kernel_vjp: terms that cancel
    # would not.
    g = jnp.where(inputs.log_decay > strongest, inputs.log_decay, strongest).astype(jnp.float32)
    # Zeros before the product: what padding holds, NaN included, must not reach a gradient.
    e = zero_padding(inputs.erase_read.astype(jnp.float32), inputs.segment_ids)
    exponent = -by_channel(g, jnp.float32)
    if g.ndim > 1:
        exponent = zero_padding(exponent, inputs.segment_ids)
    return dataclasses.replace(inputs, erase_read=(e * jnp.exp(exponent)).astype(inputs.erase_read.dtype), log_decay=g)


def _in_two_tokens(inputs: Recurrence) -> Recurrence:
    b, t, h, _ = inputs.v.shape

    def pairs(first, second):
        first = jnp.zeros_like(second) if first is None else first
        second = jnp.zeros_like(first) if second is None else second
        return jnp.stack([first, second], axis=2).reshape(b, 2 * t, *first.shape[2:])

    g, strength, segments = inputs.log_decay, inputs.write_strength, inputs.segment_ids
    k = repeat_heads(inputs.k, h)
    return dataclasses.replace(
        inputs,
        q=pairs(None, inputs.q),
        k=pairs(inputs.erase_write.astype(k.dtype), k),
        v=pairs(None, inputs.v),
        log_decay=None if g is None else pairs(jnp.broadcast_to(g, (b, t, h)) if g.ndim == 1 else g, None),
        write_strength=None if strength is None else pairs(None, strength),
        erase_read=pairs(inputs.erase_read, None),
        erase_write=None,
        segment_ids=None if segments is None else pairs(segments, segments),
    )
