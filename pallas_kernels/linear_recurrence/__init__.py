"""Linear recurrences over matrix-valued states, one equation a head:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        S in R^{k x v}
    o_t = S_t^T (scale q_t)

g is the logarithm of the decay: none, a constant a head, or a scalar a head and token. A token whose segment differs from the one
before it starts from S = 0. Padding (segment 0) leaves S as it is and reads 0.

Serves linear attention with any feature map (Katharopoulos et al. 2020, equations 16 to 20) and RetNet (Sun et al. 2023,
equations 5 to 7).
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import always, choose
from pallas_kernels.linear_recurrence import reference, xla


def linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Reads the recurrence at every token.

    Args:
      q, k: (b, t, h, k) queries and keys (features).
      v: (b, t, h, v).
      log_decay: None, (h,) or (b, t, h); at most 0 for a state that stays bounded.
      initial_state: (b, h, k, v) fp32; None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens a chunk in the xla form.
      backend: see pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token (b, h, k, v) fp32, or None.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    _check(q, k, v, log_decay, initial_state, segment_ids, initial_segment, chunk_size)
    implementations = {"xla": (xla.chunked, always), "reference": (reference.recurrent, always)}
    run = choose("linear_recurrence", backend, implementations)
    return run(
        q,
        k,
        v,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
        return_state=return_state,
        chunk_size=chunk_size,
    )


def _check(q, k, v, log_decay, initial_state, segment_ids, initial_segment, chunk_size) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"linear_recurrence: q and k must both be (b, t, h, k); got {q.shape} and {k.shape}")
    b, t, h, key_dim = q.shape
    if v.ndim != 4 or v.shape[:3] != (b, t, h):
        raise ValueError(f"linear_recurrence: v must be {(b, t, h)} + (v,); got {v.shape}")
    if log_decay is not None and log_decay.shape not in ((h,), (b, t, h)):
        raise ValueError(f"linear_recurrence: log_decay must be {(h,)} or {(b, t, h)}; got {log_decay.shape}")
    if initial_state is not None and initial_state.shape != (b, h, key_dim, v.shape[3]):
        raise ValueError(f"linear_recurrence: initial_state must be {(b, h, key_dim, v.shape[3])}; got {initial_state.shape}")
    if segment_ids is not None and segment_ids.shape != (b, t):
        raise ValueError(f"linear_recurrence: segment_ids must be {(b, t)}; got {segment_ids.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("linear_recurrence: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size < 1:
        raise ValueError(f"linear_recurrence: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["linear_recurrence"]
