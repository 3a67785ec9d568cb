"""Attention with exp replaced by its second-order Taylor series (Based, Arora et al. 2024, section 4.1). With s_ij =
scale q_i . k_j,

    w_ij = 1 + s_ij + s_ij^2 / 2 >= 1/2,      o_i = sum_{j<=i} w_ij v_j / (sum_{j<=i} w_ij + epsilon)

or the numerator alone. Since w_ij = phi(q_i) . phi(k_j) for packed features phi (features.py), a fixed state stands for
all past keys:

    S_t = S_{t-1} + phi(k_t) [v_t, 1]^T      (features x (v + 1)), the last column, the normaliser, in fp32 like the rest.

A token whose segment differs from the one before it starts from S = 0. Padding (segment 0) leaves S as it is and reads
0.
"""

from __future__ import annotations

import functools

import jax

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.sharding import sequence_parts
from recollect.pallas_kernels.taylor_attention import sequence_parallel
from recollect.pallas_kernels.taylor_attention.features import count
from recollect.pallas_kernels.taylor_attention.step import taylor_attention_step


def taylor_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    normalise: bool = True,
    epsilon: float = 1e-12,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Causal attention with weights 1 + s + s^2 / 2.

    Args:
      q, k: (b, t, hk, k) queries and keys before the feature map; hk divides h, and head i of v goes with head i // (h
        / hk) of these.
      v: (b, t, h, v).
      scale: s = scale q . k; None is 1 / sqrt(k).
      normalise: divide by the sum of weights.
      epsilon: added to that sum.
      initial_state: (b, h, 1 + k + k (k + 1) / 2, v + 1) fp32, without the last column if not `normalise`; None is
        zero.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      chunk_size: tokens a chunk in the chunked forms; None leaves it to them.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      o (b, t, h, v) in v's dtype, and the state after the last token as `initial_state`, or None.

    Raises:
      ValueError: an argument's shape does not fit, or the backend cannot serve the call.
    """
    given = {"initial_state": initial_state, "segment_ids": segment_ids, "initial_segment": initial_segment}
    _check(q, k, v, given, normalise, epsilon, chunk_size)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if sequence_parts(q.shape[1]) > 1 and initial_state is None and not return_state:
        part = functools.partial(
            taylor_attention, scale=scale, normalise=normalise, epsilon=epsilon, chunk_size=chunk_size, backend=backend
        )
        return sequence_parallel.over_devices(part, q, k, v, segment_ids, DIMENSIONS, normalise), None
    arguments = dict(
        given, scale=scale, normalise=normalise, epsilon=epsilon, return_state=return_state, chunk_size=chunk_size
    )
    run = choose("taylor_attention", backend, BACKENDS, q, k, v, **arguments)
    return run(q, k, v, **arguments)


# Letters of the arrays' dimensions, by which a mesh splits them.
DIMENSIONS = {
    "q": "b t h k",
    "k": "b t h k",
    "v": "b t h v",
    "initial_state": "b h f v",
    "segment_ids": "b t",
    "initial_segment": "b",
}
BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.taylor_attention.gpu",
    "pallas_tpu": "recollect.pallas_kernels.taylor_attention.tpu",
    "xla": "recollect.pallas_kernels.taylor_attention.xla",
    "reference": "recollect.pallas_kernels.taylor_attention.reference",
}


def _check(q, k, v, given, normalise, epsilon, chunk_size) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"taylor_attention: q must be (b, t, heads, k) with t at least 1; got {q.shape}")
    if k.shape != q.shape:
        raise ValueError(f"taylor_attention: k must have q's shape {q.shape}; got {k.shape}")
    b, t, heads, key_dim = q.shape
    if v.ndim != 4 or v.shape[:2] != (b, t):
        raise ValueError(f"taylor_attention: v must be {(b, t)} + (h, v); got {v.shape}")
    h, value_dim = v.shape[2:]
    if heads < 1 or h % heads:
        raise ValueError(f"taylor_attention: q and k have {heads} heads, which must divide the {h} of v")
    allowed = {
        "initial_state": (b, h, count(key_dim), value_dim + int(normalise)),
        "segment_ids": (b, t),
        "initial_segment": (b,),
    }
    for name, shape in allowed.items():
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"taylor_attention: {name} must be {shape}; got {given[name].shape}")
    if given["segment_ids"] is not None and given["initial_state"] is not None and given["initial_segment"] is None:
        raise ValueError("taylor_attention: initial_state together with segment_ids needs initial_segment (b,)")
    if epsilon < 0:
        raise ValueError(f"taylor_attention: epsilon must be at least 0; got {epsilon}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"taylor_attention: chunk_size must be at least 1; got {chunk_size}")


__all__ = ["BACKENDS", "taylor_attention", "taylor_attention_step"]
