"""The selective scan of Mamba: per channel a vector of states that decay at rates of their own, in steps that depend on
the token.

    h_t = exp(step_t A) * h_{t-1} + step_t u_t B_t,   y_t = C_t . h_t        per channel f, h in R^n, A per channel

A token whose segment differs from the one before it starts from h = 0. Padding (segment 0) leaves h as it is and reads
0. It is `linear_recurrence` with channels for heads, values of one dimension and a decay per channel of the key, whose
chunks multiply all pairs of their tokens in each of the f n states; here they are formed a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.segments import document_starts, zero_padding
from recollect.pallas_kernels.selective_scan import reference

BACKENDS = {
    "xla": "recollect.pallas_kernels.selective_scan.xla",
    "reference": "recollect.pallas_kernels.selective_scan.reference",
}


def selective_scan(
    u: Float[Array, "b t f"],
    step: Float[Array, "b t f"],
    log_decay: Float[Array, "f n"],
    write: Float[Array, "b t n"],
    read: Float[Array, "b t n"],
    *,
    initial_state: Float[Array, "b f n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "b t f"], Float[Array, "b f n"] | None]:
    """Reads the scan at every token.

    Args:
      u, step: (b, t, f) inputs and steps, at least 0.
      log_decay: A, (f, n), at most 0 for a state that stays bounded.
      write, read: B and C, (b, t, n), of all channels.
      initial_state: (b, f, n) fp32; None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens per chunk in the chunked backend; None lets the backend choose.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      y (b, t, f) in u's dtype, and the state after the last token (b, f, n) fp32, or None.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    _check(u, step, log_decay, write, read, initial_state, segment_ids, initial_segment, chunk_size)
    b, t, f = u.shape
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    rows = {"u": u, "step": step, "write": write, "read": read}
    rows = {name: zero_padding(x, segment_ids).astype(dtype) for name, x in rows.items()}  # steps of 0 change nothing
    if segment_ids is not None:
        rows["kept"] = 1 - document_starts(segment_ids, initial_segment).astype(dtype)
    state = jnp.zeros((b, f, log_decay.shape[1]), dtype) if initial_state is None else initial_state.astype(dtype)
    arguments = (rows, log_decay.astype(dtype), state)
    run: Callable[..., Any] = reference.selective_scan
    if t > 1 or backend is not None or initial_state is None:
        run = choose("selective_scan", backend, BACKENDS, *arguments, chunk_size=chunk_size)
    y, state = run(*arguments, chunk_size=chunk_size)
    return zero_padding(y, segment_ids).astype(u.dtype), state if return_state else None


def _check(u, step, log_decay, write, read, initial_state, segment_ids, initial_segment, chunk_size) -> None:
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"selective_scan: u must be (b, t, f) with t at least 1; got {u.shape}")
    b, t, f = u.shape
    if log_decay.ndim != 2 or log_decay.shape[0] != f:
        raise ValueError(f"selective_scan: log_decay must be ({f}, n); got {log_decay.shape}")
    n = log_decay.shape[1]
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "step": (step, (b, t, f)),
        "write": (write, (b, t, n)),
        "read": (read, (b, t, n)),
    }
    shapes |= {"initial_state": (initial_state, (b, f, n)), "segment_ids": (segment_ids, (b, t))}
    shapes |= {"initial_segment": (initial_segment, (b,))}
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"selective_scan: {name} must be {shape}; got {array.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("selective_scan: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"selective_scan: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["BACKENDS", "selective_scan"]
