"""Linear recurrences over vectors, elementwise: each channel decays and takes its input.

    h_t = a_t h_{t-1} + b_t

A token whose segment differs from the one before it starts from h = 0. Padding (segment 0) leaves h as it is and reads
0. Real or complex. RG-LRU, HGRN and minGRU are this; where the state is an outer product of keys and values
`linear_recurrence`, and where decays are constant `modal_recurrence`, never form it per token.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.linear_scan import reference, sequence_parallel
from recollect.pallas_kernels.segments import segments_before, zero_padding

BACKENDS = {
    "xla": "recollect.pallas_kernels.linear_scan.xla",
    "reference": "recollect.pallas_kernels.linear_scan.reference",
}


def linear_scan(
    a: Inexact[Array, "b t f"],
    b: Inexact[Array, "b t f"],
    *,
    initial_state: Inexact[Array, "b f"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Inexact[Array, "b t f"], Inexact[Array, "b f"] | None]:
    """Returns h at every token.

    One token that comes with a state is a step of decoding: unless a backend is named, one multiplication and addition.

    Args:
      a, b: (b, t, f) factors and inputs; |a| at most 1 for a state that stays bounded.
      initial_state: (b, f), fp32 or complex64 at least; None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens per chunk in the chunked backend; None lets the backend choose.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      h (b, t, f), and the state after the last token (b, f), or None; both fp32 or complex64 (more where a or b is).

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    _check(a, b, initial_state, segment_ids, initial_segment, chunk_size)
    t = a.shape[1]
    if sequence_parts(t) > 1 and initial_state is None and not return_state:
        return sequence_parallel.over_devices(linear_scan, a, b, segment_ids), None
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    a, b = a.astype(dtype), b.astype(dtype)
    if segment_ids is not None:
        a, b = without_segments(a, b, segment_ids, initial_segment)
    state = jnp.zeros_like(a[:, 0]) if initial_state is None else initial_state.astype(dtype)
    if t == 1 and backend is None and initial_state is not None:
        h = reference.linear_scan(a, b, state)
    else:
        run = choose("linear_scan", backend, BACKENDS, a, b, state, chunk_size=chunk_size)
        h = run(a, b, state, chunk_size=chunk_size)
    return zero_padding(h, segment_ids), h[:, -1] if return_state else None


def without_segments(
    a: Inexact[Array, "b t f"],
    b: Inexact[Array, "b t f"],
    segment_ids: Int[Array, "b t"],
    initial_segment: Int[Array, " b"] | None,
) -> tuple[Inexact[Array, "b t f"], Inexact[Array, "b t f"]]:
    """Returns factors and inputs of one document that give the same states: 0 where a document starts; 1, and no input,
    at padding."""
    real = (segment_ids != 0)[..., None]
    continues = (segment_ids == segments_before(segment_ids, initial_segment))[..., None]
    return jnp.where(real, jnp.where(continues, a, 0), 1), jnp.where(real, b, 0)


def _check(a, b, initial_state, segment_ids, initial_segment, chunk_size) -> None:
    if a.ndim != 3 or a.shape[1] < 1:
        raise ValueError(f"linear_scan: a must be (b, t, f) with t at least 1; got {a.shape}")
    rows, t, f = a.shape
    shapes = {"b": (b, (rows, t, f)), "initial_state": (initial_state, (rows, f))}
    shapes |= {"segment_ids": (segment_ids, (rows, t)), "initial_segment": (initial_segment, (rows,))}
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"linear_scan: {name} must be {shape}; got {array.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("linear_scan: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_scan: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["BACKENDS", "linear_scan"]
