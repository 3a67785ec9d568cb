"""What the kernel backends share: preparing a call for them, and the gradient, which is made of two scans over the chunks.

With a_i = sum_j w_ij + epsilon, o_i = sum_j w_ij v_j / a_i, and g the cotangent of o (a_i = 1 without a normaliser),

    dw_ij = (g_i . v_j - g_i . o_i) / a_i        (without a normaliser: g_i . v_j)        ds_ij = dw_ij (1 + s_ij)
    dq_i = scale sum_j ds_ij k_j                 dk_j = scale sum_i ds_ij q_i             dv_j = sum_i w_ij g_i / a_i

as for softmax, with a_i in place of the log-sum-exp: scans read the rows 1 / a and g . o. Across chunks the sums go
through the state: forward, dphi(q_i) = (S g_i - z (g_i . o_i)) / a_i gives dq, S and z (the normaliser's column) made
again on the way; in reverse, dphi(k_j) = dS v_j + dz and dv_j = dS^T phi(k_j), with dS collecting phi(q_i) g_i^T / a_i
and dz -phi(q_i) (g_i . o_i) / a_i. No state is stored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.recurrence import (
    Recurrence,
    in_whole_chunks,
    repeat_heads,
    without_padding,
)
from recollect.pallas_kernels.segments import carry_segments


@dataclasses.dataclass(frozen=True)
class TaylorSettings:
    """What is constant in a call; t is a multiple of `chunk`."""

    scale: float
    normalise: bool
    epsilon: float
    chunk: int
    return_state: bool


# Rows of `marks` (b, 8, t) int32, which is None for one document without padding. Padding takes the segment before it.
SEGMENT, KEY_SEGMENT, READS, WRITES, KEEPS = range(5)
# SEGMENT: as a query; KEY_SEGMENT: as a key, -1 for padding, so that a pair counts where the two are equal. 0 or 1:
# READS, it belongs to the segment of the state before its chunk; WRITES, it is no padding and belongs to the segment of
# its chunk's last token; KEEPS, these two segments of its chunk are one.


class TaylorKernels(Protocol):
    """The scans that a kernel module (tpu.py, gpu.py) provides; q, k (b, t, h, k), v, o, do (b, t, h, v), the state as
    the operation's."""

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        state: jax.Array | None,
        marks: jax.Array | None,
        settings: TaylorSettings,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """o in v's dtype, the sums of weights with epsilon (b, h, t) fp32 or None, the last state or None."""

    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        state: jax.Array | None,
        marks: jax.Array | None,
        do: jax.Array,
        inverses: jax.Array | None,
        dots: jax.Array | None,
        d_state: jax.Array | None,
        settings: TaylorSettings,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """dq, dk, dv in the dtypes of q, k, v, and the first state's gradient if there is one.

        inverses and dots: 1 / a and g . o, (b, h, t) fp32, None without a normaliser. d_state: the last state's
        cotangent, None if none was returned.
        """


def run_on_kernels(
    kernels: TaylorKernels,
    chunk_of: Callable[[int, int | None], int],
    inputs: Recurrence,
    *,
    normalise: bool = True,
    epsilon: float = 1e-12,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the operation by a module's scans, in chunks of chunk_of(t, chunk_size) tokens."""
    b, t, h, _ = inputs.v.shape
    segment_ids, first = inputs.segment_ids, inputs.initial_segment
    chunk = chunk_of(t, chunk_size)
    missing = -t % chunk
    marks = None
    if segment_ids is not None or missing:
        if segment_ids is None:
            segment_ids = jnp.ones((b, t), jnp.int32)
            first = segment_ids[:, 0]  # the state belongs to the one document
        marks = _marks(jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, missing))), first, chunk)
    inputs = in_whole_chunks(without_padding(inputs), chunk)
    q, k = (repeat_heads(x, h) for x in (inputs.q, inputs.k))
    state = None if inputs.initial_state is None else inputs.initial_state.astype(jnp.float32)
    settings = TaylorSettings(float(inputs.scale), normalise, float(epsilon), chunk, return_state)
    o, state = _attention(kernels, settings, q, k, inputs.v, state, marks)
    return o[:, :t], state


def _marks(segment_ids: jax.Array, initial_segment: jax.Array | None, chunk: int) -> jax.Array:
    b = segment_ids.shape[0]
    first = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment.astype(jnp.int32)
    segments, real = carry_segments(segment_ids, first), segment_ids != 0
    last = segments[:, chunk - 1 :: chunk]
    before = jnp.concatenate([first[:, None], last[:, :-1]], axis=1)
    last, before = (jnp.repeat(x, chunk, axis=1) for x in (last, before))
    rows = [segments, jnp.where(real, segments, -1), segments == before, real & (segments == last), last == before]
    return jnp.stack([row.astype(jnp.int32) for row in rows] + [jnp.zeros_like(segments)] * 3, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels, settings, q, k, v, state, marks):
    return _forward(kernels, settings, q, k, v, state, marks)[0]


def _forward(kernels, settings, q, k, v, state, marks):
    o, sums, last = kernels.forward(q, k, v, state, marks, settings)
    if marks is not None:  # what padding reads is not defined, not even finite
        real = marks[:, KEY_SEGMENT] >= 0
        o = jnp.where(real[:, :, None, None], o, 0)
        sums = None if sums is None else jnp.where(real[:, None], sums, jnp.inf)
    last = last if settings.return_state else None
    return (o, last), (q, k, v, state, marks, o, sums)


def _backward(kernels, settings, kept, cotangents):
    q, k, v, state, marks, o, sums = kept
    do, d_state = cotangents
    if marks is not None:
        do = jnp.where((marks[:, KEY_SEGMENT] >= 0)[:, :, None, None], do, 0)
    inverses = dots = None
    if settings.normalise:
        inverses = 1 / sums
        dots = jnp.einsum("bthv,bthv->bht", do, o, preferred_element_type=jnp.float32)
    dq, dk, dv, d_first = kernels.gradients(q, k, v, state, marks, do, inverses, dots, d_state, settings)
    return dq, dk, dv, d_first, None


_attention.defvjp(_forward, _backward)
