"""The recurrence whose state's columns decay, nothing erased, and its gradients, as chunk scans (chunk_scan.py).

With lambda_ij the decay from j to i, a factor for each channel of v,

    o_i = sum_{j<=i} (q_i . k_j) lambda_ij * v_j              the scan of (q, k, v), decay "value"
    dq_i = sum_{j<=i} k_j (do_i . (lambda_ij * v_j))          that of (do, v, k), decay "key"; dk that of (v, do, q), in reverse
    dv_j = sum_{i>=j} (q_i . k_j) lambda_ij * do_i            that of (k, q, do), in reverse, decay "value"
    dc_t = sum_{i>=t} (o_i * do_i - v_i * dv_i)               as kernel_vjp.py has it of q, dq, k and dk for a decay of the rows

As there, that sum is taken within groups of tokens, at whose ends <S, dS> stands for the rest, and leaves out the
products of a token with itself.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence import kernel_vjp
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total
from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY, Chunks, ScanKernels
from recollect.pallas_kernels.linear_recurrence.kernel_vjp import ScanSettings, sum_heads, sums_to_ends, transpose
from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, repeat_heads
from recollect.pallas_kernels.segments import zero_padding


def recurrence_by_scans(
    kernels: ScanKernels, inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes `linear_recurrence` with a decay of columns alone on a backend's kernels."""
    settings, prepared = kernel_vjp.prepare(kernels, inputs, return_state, chunk_size)
    b, _, h, value_dim = inputs.v.shape
    state = prepared.initial_state
    prepared = dataclasses.replace(
        prepared,
        value_log_decay=jnp.maximum(prepared.value_log_decay, STRONGEST_CHANNEL_DECAY),
        initial_state=jnp.zeros((b, h, inputs.q.shape[3], value_dim), jnp.float32) if state is None else state,
    )
    o, state = _recurrence(settings, prepared)
    return zero_padding(o[:, : inputs.v.shape[1]], inputs.segment_ids), state if return_state else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings: ScanSettings, inputs: Recurrence):
    return _forward(settings, inputs)[0]


def _forward(settings: ScanSettings, inputs: Recurrence):
    q, k, v = inputs.q, inputs.k, inputs.v
    result = settings.kernels.scan(
        q,
        k,
        v,
        _chunks(settings, inputs),
        heads=v.shape[2],
        scale=inputs.scale,
        initial_state=inputs.initial_state,
    )
    return (result.o, result.state), (inputs, result.state)


def _backward(settings, kept, cotangents):
    inputs, after = kept
    q, k, v, state, scale = inputs.q, inputs.k, inputs.v, inputs.initial_state, inputs.scale
    do, d_state = cotangents[0].astype(v.dtype), cotangents[1].astype(jnp.float32) / scale
    chunks = _chunks(settings, inputs)
    by_key = dataclasses.replace(chunks, decay="key")
    every = max(1, kernel_vjp.CHANNEL_GROUP // settings.size)
    scan = functools.partial(settings.kernels.scan, heads=v.shape[2], scale=scale)
    exact = functools.partial(scan, out_dtype=jnp.float32, strict=True, checkpoint_every=every)
    dq = scan(do, v, k, by_key, initial_state=transpose(state))
    dk = scan(v, do, q, by_key, initial_state=transpose(d_state), reverse=True)
    out = exact(q, k, v, chunks, initial_state=state)
    dv = exact(k, q, do, chunks, initial_state=d_state, reverse=True)
    diagonal = scale * jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
    diagonal = repeat_heads(diagonal, v.shape[2]) * do.astype(jnp.float32)
    dots = out.o * do.astype(jnp.float32) - dv.o * v.astype(jnp.float32)
    ends = jnp.concatenate([out.checkpoints[:, :, 1:], after[:, :, None]], axis=2)
    rest = scale * jnp.sum(ends * dv.checkpoints, axis=3)  # (b, h, groups, v)
    gradients = dataclasses.replace(
        inputs,
        q=sum_heads(dq.o, q),
        k=sum_heads(dk.o, k),
        v=(dv.o + diagonal).astype(v.dtype),
        value_log_decay=sums_to_ends(dots, rest, every * settings.size, chunks.segments),
        initial_state=scale * dv.state,
        segment_ids=None,
        initial_segment=None,
    )
    return (gradients,)


_recurrence.defvjp(_forward, _backward)


def _chunks(settings: ScanSettings, inputs: Recurrence) -> Chunks:
    total = running_total(inputs.value_log_decay, settings.size)
    return kernel_vjp.chunks_of(settings.size, "value", total, inputs.segment_ids, inputs.initial_segment)
