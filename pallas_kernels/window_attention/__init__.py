"""Softmax attention that is causal, windowed, kept inside documents, or masked at will.

    o_i = sum_j w_ij v_j,   w_ij = [j seen by i] exp(s_ij) / (exp(z_h) + sum over seen j' of exp(s_ij')),   s_ij = scale q_i . k_j

Vaswani et al. 2017, equation 1. z_h is a sink: a learned logit a head that takes weight and gives no value, so that a head may
attend to little (gpt-oss; Agarwal et al. 2025); without sinks exp(z_h) is absent. Query i sees key j when, by positions, j <= i and i - j <
window, and both are of one document.

Easy to get wrong: a window of w sees w keys, the query's own included; query head i uses key head i // (h / g); a query that sees no
key gives zeros; the log-sum-exp includes the sink, so that parts with sinks cannot be merged by it twice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import always, choose
from pallas_kernels.window_attention import reference, xla


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    mask: jax.Array | None = None,
    sinks: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Softmax attention, sequence first.

    Self-attention is recognised when t == s and the key fields are left out (they are then the queries') or are the very arrays given
    for the queries. In self-attention a document's tokens are contiguous but for padding, and their positions increase: keys stored
    after a query are taken to be hidden from it, which saves half of the work, or all but the window's. Use `mask` for anything else.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      window: keys a query sees, itself included; None is all before it.
      mask: (b or 1, t, s) bool, True where seen; takes the place of the rule by positions, window and segments.
      sinks: (h,) logits.
      query_positions, key_positions: (b, t) and (b, s) int; None counts from 0, and needs t == s.
      query_segments, key_segments: (b, t) and (b, s) int, 0 is padding, which may hold NaN; None is one document.
      scale: of the scores; None is k^(-1/2).
      backend: see pallas_kernels.dispatch.

    Returns:
      (b, t, h, v) in q's dtype, zeros for padded queries and for those that see no key; with `return_lse` also the logarithm of the
      softmax denominator (b, t, h) fp32, -inf where nothing is seen (the sink counts as seen, except by padded queries).

    Raises:
      ValueError: an argument's shape, type or value does not fit.
    """
    same_length = k.ndim == 4 and q.ndim == 4 and k.shape[1] == q.shape[1]
    if same_length and key_positions is None:
        key_positions = query_positions
    if same_length and key_segments is None:
        key_segments = query_segments
    _check(q, k, v, window, mask, sinks, query_positions, key_positions, query_segments, key_segments)
    run = choose("window_attention", backend, {"xla": (xla.attention, always), "reference": (reference.attention, always)})
    out, lse = run(
        q,
        k,
        v,
        window=window,
        mask=mask,
        sinks=sinks,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, window, mask, sinks, query_positions, key_positions, query_segments, key_segments) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"window_attention: {name} must have four dimensions; got {array.shape}")
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != dim:
        raise ValueError(f"window_attention: k must be ({b}, s, g, {dim}) to fit q {q.shape}; got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"window_attention: v must be {k.shape[:3]} + (v,); got {v.shape}")
    if groups < 1 or h % groups:
        raise ValueError(f"window_attention: q has {h} heads, which is no multiple of the {groups} heads of k")
    if window is not None and window < 1:
        raise ValueError(f"window_attention: window must be at least 1, or None; got {window}")
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"window_attention: sinks must be {(h,)}; got {sinks.shape}")
    if mask is not None and (mask.shape not in ((b, t, s), (1, t, s)) or mask.dtype != jnp.bool_):
        raise ValueError(f"window_attention: mask must be bool {(b, t, s)} or {(1, t, s)}; got {mask.dtype} {mask.shape}")
    for name, field, shape in (
        ("query_positions", query_positions, (b, t)),
        ("key_positions", key_positions, (b, s)),
        ("query_segments", query_segments, (b, t)),
        ("key_segments", key_segments, (b, s)),
    ):
        if field is not None and field.shape != shape:
            raise ValueError(f"window_attention: {name} must be {shape}; got {field.shape}")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("window_attention: query_segments and key_segments must be given together")
    if mask is None and t != s and (query_positions is None or key_positions is None):
        raise ValueError(f"window_attention: {t} queries and {s} keys need query_positions and key_positions, or a mask")


__all__ = ["window_attention"]
