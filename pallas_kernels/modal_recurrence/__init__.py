"""Linear recurrences with constant modes: per head, several states decay and turn, each at its own constant rate, take
the same inputs, and are read as one.

    S^n_t = exp(log_pole_n) S^n_{t-1} + k_t v_t^T        n = 1 ... modes,   S^n in R^{k x v} or C^{k x v}
    o_t   = Re(sum_n residue_n S^n_t)^T q_t

which is linear attention whose products of keys and queries are weighted by a filter of the time between them,

    o_t = sum_{s <= t} f(t - s) (q_t . k_s) v_s,         f(i) = Re(sum_n residue_n exp(i log_pole_n)).

A token whose segment differs from the one before it starts from S = 0. Padding (segment 0) leaves S as it is and reads
0. Diagonal state space models of one input per channel are this: S4D (heads are channels, without q and k), H3, and the
long convolution of Hyena-2. Decays that depend on the token are `linear_recurrence`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.modal_recurrence import reference
from recollect.pallas_kernels.segments import zero_padding

BACKENDS = {
    "xla": "recollect.pallas_kernels.modal_recurrence.xla",
    "reference": "recollect.pallas_kernels.modal_recurrence.reference",
}


def modal_recurrence(
    v: Float[Array, "b t h v"],
    log_poles: Inexact[Array, "h n"],
    residues: Inexact[Array, "h n"],
    *,
    q: Float[Array, "b t h k"] | None = None,
    k: Float[Array, "b t h k"] | None = None,
    initial_state: Float[Array, "b h m k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h m k v"] | None]:
    """Reads the recurrence at every token. The letters are those of the equation above.

    One token that comes with a state is a step of decoding, without a loop unless a backend is named.

    Args:
      v: (b, t, h, v).
      log_poles: (h, n), both real or both complex with `residues`; real parts at most 0 for a state that stays bounded.
      residues: (h, n).
      q, k: (b, t, h, k), both or neither: without them both are 1, and k is one dimension.
      initial_state: (b, h, m, k, v) fp32, m the modes, or twice as many where they are complex: real parts, then
        imaginary ones. None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens per chunk in the chunked backend; None lets the backend choose.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token, or None.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    _check(v, log_poles, residues, q, k, initial_state, segment_ids, initial_segment, chunk_size)
    b, t = v.shape[:2]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    rows = [None if x is None else zero_padding(x, segment_ids).astype(dtype) for x in (q, k, v)]
    first = initial_segment
    if segment_ids is not None and first is None:
        first = jnp.zeros(b, segment_ids.dtype)
    arrays = (*rows, log_poles, residues, initial_state)
    settings: dict[str, Any] = {"segment_ids": segment_ids, "first": first}
    settings |= {"return_state": return_state, "chunk_size": chunk_size}
    run: Callable[..., Any] = reference.modal_recurrence
    if t > 1 or backend is not None or initial_state is None:
        run = choose("modal_recurrence", backend, BACKENDS, *arrays, **settings)
    o, state = run(*arrays, **settings)
    return zero_padding(o, segment_ids).astype(v.dtype), state


def state_shape(
    v: Float[Array, "b t h v"], log_poles: Inexact[Array, "h n"], k: Float[Array, "b t h k"] | None = None
) -> tuple[int, int, int, int, int]:
    """Returns the shape (b, h, m, k, v) of the state."""
    b, _, h, value_dim = v.shape
    parts = 2 if jnp.iscomplexobj(log_poles) else 1
    return b, h, parts * log_poles.shape[1], 1 if k is None else k.shape[3], value_dim


def _check(v, log_poles, residues, q, k, initial_state, segment_ids, initial_segment, chunk_size) -> None:
    if v.ndim != 4 or v.shape[1] < 1:
        raise ValueError(f"modal_recurrence: v must be (b, t, h, v) with t at least 1; got {v.shape}")
    if log_poles.ndim != 2 or log_poles.shape[0] != v.shape[2]:
        raise ValueError(f"modal_recurrence: log_poles must be ({v.shape[2]}, n); got {log_poles.shape}")
    if residues.shape != log_poles.shape or jnp.iscomplexobj(residues) != jnp.iscomplexobj(log_poles):
        kinds = ["complex" if jnp.iscomplexobj(x) else "real" for x in (log_poles, residues)]
        raise ValueError(
            f"modal_recurrence: log_poles ({kinds[0]} {log_poles.shape}) and residues ({kinds[1]} {residues.shape}) "
            "must have one shape and both be real or both complex"
        )
    if (q is None) != (k is None):
        raise ValueError("modal_recurrence: q and k must both be given, or neither")
    if q is not None and (q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]):
        raise ValueError(f"modal_recurrence: q and k must be {v.shape[:3]} + (k,); got {q.shape} and {k.shape}")
    shapes = {"initial_state": (initial_state, state_shape(v, log_poles, k))}
    shapes |= {"segment_ids": (segment_ids, v.shape[:2]), "initial_segment": (initial_segment, v.shape[:1])}
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"modal_recurrence: {name} must be {shape}; got {array.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("modal_recurrence: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"modal_recurrence: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["BACKENDS", "modal_recurrence", "state_shape"]
