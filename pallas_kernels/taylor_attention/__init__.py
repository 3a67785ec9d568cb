"""Attention with exp replaced by its second-order Taylor series (Based, Arora et al. 2024, section 4.1). With s_ij =
scale q_i . k_j,

    w_ij = 1 + s_ij + s_ij^2 / 2 >= 1/2,      o_i = sum_{j<=i} w_ij v_j / (sum_{j<=i} w_ij + epsilon)

or the numerator alone. Since w_ij = phi(q_i) . phi(k_j) for packed features phi (features.py), a fixed state stands for
all past keys:

    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T      (features x (v + 1)) fp32, the last column the normaliser.

A token whose segment differs from the one before it starts from S = 0. Padding (segment 0) leaves S as it is and reads
0.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence, check
from recollect.pallas_kernels.taylor_attention import reference, sequence_parallel
from recollect.pallas_kernels.taylor_attention.features import count
from recollect.pallas_kernels.taylor_attention.step import taylor_attention_step

BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.taylor_attention.gpu",
    "pallas_tpu": "recollect.pallas_kernels.taylor_attention.tpu",
    "xla": "recollect.pallas_kernels.taylor_attention.xla",
    "reference": "recollect.pallas_kernels.taylor_attention.reference",
}


def taylor_attention(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    *,
    scale: float | None = None,
    normalise: bool = True,
    epsilon: float = 1e-12,
    initial_state: Float[Array, "b h f columns"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h f columns"] | None]:
    """Attends causally with weights 1 + s + s^2 / 2.

    One token that comes with a state is a step of decoding: unless a backend is named, XLA advances the state in one
    pass over it (step.py).

    Args:
      q, k: (b, t, g, k) queries and keys before the feature map; g divides h, and head i of v goes with head i // (h /
        g) of these.
      v: (b, t, h, v).
      scale: s = scale q . k; None is 1 / sqrt(k).
      normalise: divide by the sum of weights.
      epsilon: added to that sum.
      initial_state: (b, h, 1 + k + k (k + 1) / 2, v + 1) fp32, without the last column if not `normalise`; None is
        zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens per chunk in the chunked backends; None leaves it to them.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token as `initial_state`, or None.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = Recurrence(
        q, k, v, initial_state=initial_state, segment_ids=segment_ids, initial_segment=initial_segment, scale=scale
    )
    return _run(
        inputs, normalise=normalise, epsilon=epsilon, return_state=return_state, chunk_size=chunk_size, backend=backend
    )


def _run(inputs: Recurrence, *, normalise, epsilon, return_state=False, chunk_size=None, backend=None):
    state_dims = (count(inputs.q.shape[-1]), inputs.v.shape[-1] + int(normalise))
    check("taylor_attention", inputs, chunk_size, state_dims)
    if epsilon < 0:
        raise ValueError(f"taylor_attention: epsilon must be at least 0; got {epsilon}")
    settings: dict[str, Any] = {"normalise": normalise, "epsilon": epsilon}
    t, starts_from_zero = inputs.q.shape[1], inputs.initial_state is None
    if t == 1 and backend is None and not starts_from_zero:
        return reference.taylor_attention(inputs, **settings, return_state=return_state)
    if sequence_parts(t) > 1 and starts_from_zero and not return_state:
        run = functools.partial(_run, **settings, chunk_size=chunk_size, backend=backend)
        return sequence_parallel.over_devices(run, inputs, normalise), None
    settings |= {"return_state": return_state, "chunk_size": chunk_size}
    return choose("taylor_attention", backend, BACKENDS, inputs, **settings)(inputs, **settings)


__all__ = ["BACKENDS", "taylor_attention", "taylor_attention_step"]
