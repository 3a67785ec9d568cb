"""Linear recurrences over matrix-valued states, one equation per head. A token decays the state, erases from it, writes
to it and reads it:

    S'_t = Diag(exp g_t) S_{t-1} Diag(exp c_t)                   S in R^{k x v}
    S_t = S'_t + k_t (w_t * v_t)^T - u_t (S'_t^T e_t)^T
    o_t = S_t^T (scale q_t)

g is the logarithm of the decay: none, a constant per head, a scalar per head and token, or one per channel of the key;
c, mostly none, that of the state's columns. e is what is read out of the state to be erased (none: nothing is erased)
and u the key it is erased with, k itself if not given; with `erase_before_decay` it reads S_{t-1} in place of S'_t. A
token whose segment differs from the one before it starts from S = 0. Padding (segment 0) leaves S as it is and reads 0.

What published models pass; beta is a strength in (0, 1), the k of delta rules has unit length:

    linear attention (Katharopoulos et al. 2020, equations 16-20)    q = phi(q), k = phi(k)
    RetNet (Sun et al. 2023, equations 5-7)          log_decay (h,) = log(1 - 2^(-5-h))
    TransNormerLLM, Lightning (Qin et al. 2023)      log_decay (h,) = -slopes of the layer
    GLA (Yang et al. 2023, section 4)                log_decay (b, t, h, k) = logsigmoid(.) / 16
    Mamba-2, SSD (Dao and Gu 2024, equation 16)      log_decay (b, t, h) = -A dt; write_strength = dt; q = C, k = B in
                                                     one head, v = x
    DeltaNet (Yang et al. 2024a)                     erase_read = beta k; write_strength = beta
    Gated DeltaNet (Yang et al. 2024b, equation 10)  as DeltaNet, and log_decay (b, t, h)
    KDA (Kimi Linear, 2025)                          as DeltaNet, and log_decay (b, t, h, k)
    Gated DeltaNet 2 (2026)                          log_decay (b, t, h, k); erase_read = b k with b (b, t, h, k);
                                                     write_strength (b, t, h, v)
    RWKV-7 (Peng et al. 2025)                        log_decay (b, t, h, k) = log w; erase_read = kk;
                                                     erase_write = a kk; erase_before_decay
    Comba (Hu et al. 2025)                           q = q - D p; log_decay (b, t, h); erase_read = beta p with
                                                     p = k sigmoid(d); write_strength = beta; erase_before_decay
    GSA (Zhang et al. 2024), two calls, m slots      v = s = 1 - exp f; value_log_decay (b, t, h, m) = f =
                                                     logsigmoid(.) / 8; then q = softmax(o), k = s, log_decay = f
    Raven (Afzal and Bick 2026)                      as GSA, f = -A dt r; weights r (b, t, h, m) of a token's top
                                                     slots, 0 in others
"""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.linear_recurrence import reference, sequence_parallel
from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, check
from recollect.pallas_kernels.linear_recurrence.step import linear_recurrence_step

BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.linear_recurrence.pallas_gpu",
    "pallas_tpu": "recollect.pallas_kernels.linear_recurrence.pallas_tpu",
    "xla": "recollect.pallas_kernels.linear_recurrence.xla",
    "reference": "recollect.pallas_kernels.linear_recurrence.reference",
    # After those that serve every call, so by name alone, until a measurement says where it is the fastest.
    "jla": "recollect.pallas_kernels.linear_recurrence.jla",
}


def linear_recurrence(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    *,
    log_decay: Float[Array, " h"] | Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    value_log_decay: Float[Array, "b t h v"] | None = None,
    write_strength: Float[Array, "b t h"] | Float[Array, "b t h v"] | None = None,
    erase_read: Float[Array, "b t h k"] | None = None,
    erase_write: Float[Array, "b t h k"] | None = None,
    erase_before_decay: bool = False,
    scale: float = 1.0,
    initial_state: Float[Array, "b h k v"] | Float[Array, "b n h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b n h k v"] | None]:
    """Reads the recurrence at every token. The letters are those of the equation above.

    One token that comes with a state is a step of decoding: unless a backend is named, XLA advances the state in one
    pass over it (step.py).

    Args:
      q, k: (b, t, g, k) queries and keys (features); g divides h, and head i of v goes with head i // (h / g) of these.
      v: (b, t, h, v).
      log_decay: g, None, (h,), (b, t, h) or (b, t, h, k); at most 0 for a state that stays bounded.
      value_log_decay: c, None or (b, t, h, v): decay of the state's columns, S'_t = Diag(exp g_t) S_{t-1} Diag(exp
        c_t).
      write_strength: w, None (1), (b, t, h) or (b, t, h, v).
      erase_read: e, None or (b, t, h, k).
      erase_write: u, None (k itself) or (b, t, h, k); only with erase_read.
      erase_before_decay: the erase reads S_{t-1}^T e_t, the state before this token's decay, in place of S'_t^T e_t;
        only with erase_read.
      scale: multiplies the outputs.
      initial_state: (b, h, k, v) fp32; None is zero. Or (b, n, h, k, v), with `segment_ids`: the i-th document of a
        row starts from the i-th of its n states, whatever its segment is; further ones read NaN (reference and xla).
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens per chunk in the chunked backends; None leaves it to them.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token (b, h, k, v) fp32, or None. With states per
      document those after each (b, n, h, k, v), the given ones for documents that a row lacks.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    inputs = Recurrence(
        q,
        k,
        v,
        log_decay=log_decay,
        value_log_decay=value_log_decay,
        write_strength=write_strength,
        erase_read=erase_read,
        erase_write=erase_write,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
        erase_before_decay=erase_before_decay,
        scale=scale,
    )
    return run_recurrence(inputs, return_state=return_state, chunk_size=chunk_size, backend=backend)


def run_recurrence(
    inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None, backend: str | None = None
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"] | Float[Array, "b n h k v"] | None]:
    """Computes `linear_recurrence` of inputs that are one pytree.

    Raises:
      ValueError: an input's shape does not fit, or the backend cannot serve the call.
    """
    check("linear_recurrence", inputs, chunk_size)
    t, starts_from_zero = inputs.q.shape[1], inputs.initial_state is None
    if t == 1 and backend is None and not starts_from_zero:
        return reference.linear_recurrence(inputs, return_state=return_state)
    # Where columns decay and are erased from, what is left of a state that enters differs from column to column: k x k
    # for each of them.
    splits = inputs.value_log_decay is None or inputs.erase_read is None
    if splits and sequence_parts(t) > 1 and starts_from_zero and not return_state:
        run = functools.partial(run_recurrence, chunk_size=chunk_size, backend=backend)
        return sequence_parallel.over_devices(run, inputs), None
    settings: dict[str, Any] = {"return_state": return_state, "chunk_size": chunk_size}
    return choose("linear_recurrence", backend, BACKENDS, inputs, **settings)(inputs, **settings)


__all__ = ["BACKENDS", "Recurrence", "linear_recurrence", "linear_recurrence_step", "run_recurrence"]
