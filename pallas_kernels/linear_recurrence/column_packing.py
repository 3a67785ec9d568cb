"""The recurrence whose state's columns decay, nothing erased, and its gradients, as walks (see walks.py).

With lambda_ij the decay from j to i, a factor for each channel of v,

    o_i = sum_{j<=i} (q_i . k_j) lambda_ij * v_j              the walk of (q, k, v), decay "value"
    dq_i = sum_{j<=i} k_j (do_i . (lambda_ij * v_j))          that of (do, v, k), decay "key"; dk that of (v, do, q), from the end
    dv_j = sum_{i>=j} (q_i . k_j) lambda_ij * do_i            that of (k, q, do), from the end, decay "value"
    dc_t = sum_{i>=t} (o_i * do_i - v_i * dv_i)               as passes.py has it of q, dq, k and dk for a decay of the state's rows.

As there, that sum is taken within groups of tokens, at whose ends <S, dS> stands for the rest, and leaves out what a
token has of itself.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total
from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY
from recollect.pallas_kernels.linear_recurrence.kernel_vjp import (
    CHANNEL_GROUP,
    Walks,
    chunks_of,
    gathered,
    sums_to_ends,
)
from recollect.pallas_kernels.linear_recurrence.xla import by_channel, carried


@dataclasses.dataclass(frozen=True)
class _Setting:
    walks: Walks
    size: int
    scale: float


def by_walks_of_columns(
    walks: Walks,
    q,
    k,
    v,
    *,
    value_log_decay,
    write_strength=None,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """The front door's call on a backend's walks."""
    b, t, h, value_dim = v.shape
    key_dim, dtype = q.shape[3], v.dtype
    rows = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v}
    rows["g"] = jnp.maximum(value_log_decay.astype(jnp.float32), STRONGEST_CHANNEL_DECAY)
    strength = None if write_strength is None else by_channel(write_strength, jnp.float32)
    segments = first = None
    if segment_ids is not None:
        real = (segment_ids != 0)[:, :, None, None]
        rows = {name: jnp.where(real, x, 0) for name, x in rows.items()}
        strength = None if strength is None else jnp.where(real, strength, 0)
        first = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment
        segments = carried(segment_ids, first)
    if strength is not None:
        rows["v"] = (strength * rows["v"]).astype(dtype)
    c = chunk_size or walks.chunk_size("value", False, key_dim, value_dim, dtype)
    if t % c:
        # Trailing zeros write nothing and decay nothing; their segment is the last one, so the final state is right.
        rows = {name: jnp.pad(x, ((0, 0), (0, -t % c), (0, 0), (0, 0))) for name, x in rows.items()}
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, -t % c)), mode="edge")
    state = (
        jnp.zeros((b, h, key_dim, value_dim), jnp.float32)
        if initial_state is None
        else initial_state.astype(jnp.float32)
    )
    o, state = _recurrence(_Setting(walks, c, float(scale)), rows, state, segments, first)
    o = o[:, :t]
    return o if segment_ids is None else jnp.where(real, o, 0), state if return_state else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(setting, rows, state, segments, first):
    return _forwards(setting, rows, state, segments, first)[0]


def _forwards(setting, rows, state, segments, first):
    chunks = chunks_of(setting.size, "value", running_total(rows["g"], setting.size), segments, first)
    q, k, v = (rows[name] for name in "qkv")
    walked = setting.walks.walk(q, k, v, chunks, heads=v.shape[2], scale=setting.scale, initial_state=state)
    return (walked.o, walked.state), (rows, state, segments, first, walked.state)


def _backwards(setting, kept, cotangents):
    rows, state, segments, first, after = kept
    q, k, v = (rows[name] for name in "qkv")
    heads, scale = v.shape[2], setting.scale
    do, dstate = cotangents[0].astype(v.dtype), cotangents[1].astype(jnp.float32) / scale
    chunks = chunks_of(setting.size, "value", running_total(rows["g"], setting.size), segments, first)
    turned = dataclasses.replace(chunks, decay="key")
    every = max(1, CHANNEL_GROUP // setting.size)
    walk = functools.partial(setting.walks.walk, heads=heads, scale=scale)
    apart = {"out_dtype": jnp.float32, "strict": True, "checkpoint_every": every}
    to_q = walk(do, v, k, turned, initial_state=jnp.swapaxes(state, -1, -2))
    to_k = walk(v, do, q, turned, initial_state=jnp.swapaxes(dstate, -1, -2), reverse=True)
    read = walk(q, k, v, chunks, initial_state=state, **apart)
    back = walk(k, q, do, chunks, initial_state=dstate, reverse=True, **apart)
    itself = scale * jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
    itself = jnp.repeat(itself, heads // q.shape[2], axis=2) * do.astype(jnp.float32)
    dots = read.o * do.astype(jnp.float32) - back.o * v.astype(jnp.float32)
    at_ends = jnp.concatenate([read.checkpoints[:, :, 1:], after[:, :, None]], axis=2)
    rest = scale * jnp.sum(at_ends * back.checkpoints, axis=3)  # (b, h, groups, v)
    gradients = {
        "q": gathered(to_q.o, q),
        "k": gathered(to_k.o, k),
        "v": (back.o + itself).astype(v.dtype),
        "g": sums_to_ends(dots, rest, every * setting.size, chunks.segments),
    }
    return gradients, scale * back.state, None, None


_recurrence.defvjp(_forwards, _backwards)
