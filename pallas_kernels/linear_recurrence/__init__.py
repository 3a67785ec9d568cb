"""Linear recurrences over matrix-valued states, one equation per head. A token decays the state, erases from it, writes
to it, reads it:

    S'_t = Diag(exp g_t) S_{t-1} Diag(exp c_t)                   S in R^{k x v}
    S_t = S'_t + k_t (w_t * v_t)^T - u_t (S'_t^T e_t)^T
    o_t = S_t^T (scale q_t)

g is the logarithm of the decay: none, a constant per head, a scalar per head and token, or one per channel of the key;
c, mostly none, that of the state's columns. e is what is read out of the state to be erased (none: nothing is erased)
and u the key it is erased with, k itself if not given; with `erase_before_decay` it reads S_{t-1} in place of S'_t. A
token whose segment differs from the one before it starts from S = 0. Padding (segment 0) leaves S as it is and reads 0.

What the published models hand over; beta is a strength in (0, 1), k of the delta rules has unit length:

    linear attention (Katharopoulos et al. 2020, equations 16-20)    q = phi(q), k = phi(k)
    RetNet (Sun et al. 2023, equations 5-7)          log_decay (h,) = log(1 - 2^(-5-h))
    TransNormerLLM, Lightning (Qin et al. 2023)      log_decay (h,) = -slopes of the layer
    GLA (Yang et al. 2023, section 4)                log_decay (b, t, h, k) = logsigmoid(.) / 16
    Mamba-2, SSD (Dao and Gu 2024, equation 16)      log_decay (b, t, h) = -A dt; write_strength = dt; q = C, k = B in one head, v = x
    DeltaNet (Yang et al. 2024a)                     erase_read = beta k; write_strength = beta
    Gated DeltaNet (Yang et al. 2024b, equation 10)  as DeltaNet, and log_decay (b, t, h)
    KDA (Kimi Linear, 2025)                          as DeltaNet, and log_decay (b, t, h, k)
    Gated DeltaNet 2 (2026)                          log_decay (b, t, h, k); erase_read = b k with b (b, t, h, k); write_strength (b, t, h, v)
    RWKV-7 (Peng et al. 2025)                        log_decay (b, t, h, k) = log w; erase_read = kk; erase_write = a kk; erase_before_decay
    Comba (Hu et al. 2025)                           q = q - D p; log_decay (b, t, h); erase_read = beta p with p = k sigmoid(d);
                                                     write_strength = beta; erase_before_decay
    GSA (Zhang et al. 2024), two calls, m slots      v = s = 1 - exp f; value_log_decay (b, t, h, m) = f = logsigmoid(.) / 8; then
                                                     q = softmax(o), k = s, log_decay (b, t, h, m) = f
    Raven (Afzal and Bick 2026)                      as GSA, f = -A dt r; weights r (b, t, h, m) of a token's top slots, 0 in others
"""

from __future__ import annotations

import functools

import jax

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.linear_recurrence import sequence_parallel
from recollect.pallas_kernels.linear_recurrence.step import linear_recurrence_step
from recollect.pallas_kernels.sharding import sequence_parts


def linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    value_log_decay: jax.Array | None = None,
    write_strength: jax.Array | None = None,
    erase_read: jax.Array | None = None,
    erase_write: jax.Array | None = None,
    erase_before_decay: bool = False,
    scale: float = 1.0,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Reads the recurrence at every token. The letters are those of the equation above.

    Args:
      q, k: (b, t, hk, k) queries and keys (features); hk divides h, and head i of v goes with head i // (h / hk) of
        these.
      v: (b, t, h, v).
      log_decay: g, None, (h,), (b, t, h) or (b, t, h, k); at most 0 for a state that stays bounded.
      value_log_decay: c, None or (b, t, h, v): decay of the state's columns, S'_t = Diag(exp g_t) S_{t-1} Diag(exp
        c_t).
      write_strength: w, None (1), (b, t, h) or (b, t, h, v).
      erase_read: e, None or (b, t, h, k).
      erase_write: u, None (k itself) or (b, t, h, k); only with erase_read.
      erase_before_decay: the erase reads S_{t-1}^T e_t, the state before this token's decay, in place of S'_t^T e_t;
        only with erase_read.
      initial_state: (b, h, k, v) fp32; None is zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens a chunk in the chunked forms; None leaves it to them.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token (b, h, k, v) fp32, or None.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    given = {
        "log_decay": log_decay,
        "value_log_decay": value_log_decay,
        "write_strength": write_strength,
        "erase_read": erase_read,
        "erase_write": erase_write,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "initial_segment": initial_segment,
    }
    _check(q, k, v, given, chunk_size)
    if erase_before_decay and erase_read is None:
        raise ValueError("linear_recurrence: erase_before_decay without erase_read: there is nothing to erase")
    # Where columns decay and are erased from, what is left of a state that enters differs from column to column: k x k
    # for each of them.
    splits = value_log_decay is None or erase_read is None
    if splits and sequence_parts(q.shape[1]) > 1 and initial_state is None and not return_state:
        rows = {"q": q, "k": k, "v": v, **{name: x for name, x in given.items() if not name.startswith("initial")}}
        part = functools.partial(linear_recurrence, erase_before_decay=erase_before_decay, backend=backend)
        return sequence_parallel.over_devices(part, rows, DIMENSIONS, scale, chunk_size), None
    arguments = dict(
        given, erase_before_decay=erase_before_decay, scale=scale, return_state=return_state, chunk_size=chunk_size
    )
    run = choose("linear_recurrence", backend, BACKENDS, q, k, v, **arguments)
    return run(q, k, v, **arguments)


BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.linear_recurrence.pallas_gpu",
    "pallas_tpu": "recollect.pallas_kernels.linear_recurrence.pallas_tpu",
    "xla": "recollect.pallas_kernels.linear_recurrence.xla",
    "reference": "recollect.pallas_kernels.linear_recurrence.reference",
    # After those that serve every call, so by name alone, until a measurement says where it is the fastest.
    "jla": "recollect.pallas_kernels.linear_recurrence.jla",
}
# Letters of the arrays' dimensions, by which a mesh splits them.
DIMENSIONS = {
    "q": "b t h k",
    "k": "b t h k",
    "v": "b t h v",
    "log_decay": ("h", "b t h", "b t h k"),
    "value_log_decay": "b t h v",
    "write_strength": ("b t h", "b t h v"),
    "erase_read": "b t h k",
    "erase_write": "b t h k",
    "initial_state": "b h k v",
    "segment_ids": "b t",
    "initial_segment": "b",
}


def _check(q, k, v, given, chunk_size) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"linear_recurrence: q must be (b, t, heads, k) with t at least 1; got {q.shape}")
    if k.shape != q.shape:
        raise ValueError(f"linear_recurrence: k must have q's shape {q.shape}; got {k.shape}")
    b, t, heads, key_dim = q.shape
    if v.ndim != 4 or v.shape[:2] != (b, t):
        raise ValueError(f"linear_recurrence: v must be {(b, t)} + (h, v); got {v.shape}")
    h, value_dim = v.shape[2:]
    if heads < 1 or h % heads:
        raise ValueError(f"linear_recurrence: q and k have {heads} heads, which must divide the {h} of v")
    allowed = {
        "log_decay": ((h,), (b, t, h), (b, t, h, key_dim)),
        "value_log_decay": ((b, t, h, value_dim),),
        "write_strength": ((b, t, h), (b, t, h, value_dim)),
        "erase_read": ((b, t, h, key_dim),),
        "erase_write": ((b, t, h, key_dim),),
        "initial_state": ((b, h, key_dim, value_dim),),
        "segment_ids": ((b, t),),
        "initial_segment": ((b,),),
    }
    for name, shapes in allowed.items():
        if given[name] is not None and given[name].shape not in shapes:
            raise ValueError(
                f"linear_recurrence: {name} must be {' or '.join(map(str, shapes))}; got {given[name].shape}"
            )
    if given["erase_write"] is not None and given["erase_read"] is None:
        raise ValueError("linear_recurrence: erase_write without erase_read: there is nothing to erase")
    if given["segment_ids"] is not None and given["initial_state"] is not None and given["initial_segment"] is None:
        raise ValueError("linear_recurrence: initial_state together with segment_ids needs initial_segment (b,)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_recurrence: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["BACKENDS", "linear_recurrence", "linear_recurrence_step"]
