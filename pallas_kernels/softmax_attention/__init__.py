"""Softmax attention that is causal, windowed, kept inside documents, or masked at will.

    o_i = sum_j w_ij v_j,   w_ij = [j seen by i] exp(s_ij) / (exp(z_h) + sum over seen j' of exp(s_ij')),   s_ij = scale q_i . k_j

Vaswani et al. 2017, equation 1. z_h is a sink: a learned logit a head that takes weight and gives no value, so that a
head may attend to little (gpt-oss; Agarwal et al. 2025); without sinks exp(z_h) is absent. Query i sees key j when, by
positions, j <= i and i - j < window, and both are of one document.

Easy to get wrong: a window of w sees w keys, the query's own included; query head i uses key head i // (h / g); a query
that sees no key gives zeros; the log-sum-exp includes the sink, so that parts with sinks cannot be merged by it twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.masks import Mask, is_expression
from recollect.pallas_kernels.scheduled_attention.block_schedule import Fields
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge
from recollect.pallas_kernels.sharding import sequence_parts
from recollect.pallas_kernels.softmax_attention import sequence_parallel

# A library where one serves: cuDNN on NVIDIA GPUs, jax's splash attention on TPUs (their modules say what they refuse).
# The scheduled kernels serve the rest: sinks on Hopper, masks over token fields, positions, log-sum-exps with
# gradients, the same bits in every run.
BACKENDS = {
    "cudnn": "recollect.pallas_kernels.softmax_attention.cudnn",
    "pallas_gpu": "recollect.pallas_kernels.softmax_attention.gpu",
    "splash": "recollect.pallas_kernels.softmax_attention.splash",
    "pallas_tpu": "recollect.pallas_kernels.softmax_attention.tpu",
    "xla": "recollect.pallas_kernels.softmax_attention.xla",
    "reference": "recollect.pallas_kernels.softmax_attention.reference",
}


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    mask: jax.Array | Mask | None = None,
    sinks: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_fields: Fields | None = None,
    key_fields: Fields | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """Softmax attention, sequence first.

    Self-attention is recognised when t == s and the key fields are left out (they are then the queries') or are the
    very arrays given for the queries. In self-attention without a mask a document's tokens are contiguous but for
    padding, and their positions increase: keys stored after a query are taken to be hidden from it, which saves half of
    the work, or all but the window's. Use `mask` for anything else. Where a mesh splits tokens, a window's keys are
    also taken to stand fewer than `window`
    places before the query: no padding inside of a document.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      window: keys a query sees, itself included; None is all before it.
      mask: takes the place of causality, window and segments: an expression over token fields
        (pallas_kernels/masks.py), of which only tiles that may hold a visible pair are computed; or (b or 1, t, s)
        bool, True where seen. Padding is seen by nobody.
      sinks: (h,) logits.
      query_positions, key_positions: (b, t) and (b, s) int; None counts from 0, and needs t == s.
      query_segments, key_segments: (b, t) and (b, s) int, 0 is padding, which may hold NaN; None is one document.
      query_fields, key_fields: what else a mask expression reads, name -> (b or 1, t) and (b or 1, s) int.
      scale: of the scores; None is k^(-1/2).
      deterministic: refuse forms whose gradients may differ from run to run in their last bits (cuDNN's).
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      (b, t, h, v) in q's dtype, zeros for padded queries and for those that see no key; with `return_lse` also the
      logarithm of the softmax denominator (b, t, h) fp32, -inf where nothing is seen (the sink counts as seen, except
      by padded queries).

    Raises:
      ValueError: an argument's shape, type or value does not fit; the backend cannot serve the call.
    """
    same_length = k.ndim == 4 and q.ndim == 4 and k.shape[1] == q.shape[1]
    if same_length and key_positions is None:
        key_positions = query_positions
    if same_length and key_segments is None:
        key_segments = query_segments
    if same_length and key_fields is None:
        key_fields = query_fields
    _check(
        q,
        k,
        v,
        window,
        mask,
        sinks,
        query_positions,
        key_positions,
        query_segments,
        key_segments,
        query_fields,
        key_fields,
    )
    own = key_positions is query_positions and key_segments is query_segments and key_fields is query_fields
    if same_length and own and sequence_parts(q.shape[1]) > 1:
        return sequence_parallel.over_devices(
            functools.partial(
                softmax_attention, scale=scale, return_lse=return_lse, deterministic=deterministic, backend=backend
            ),
            q,
            k,
            v,
            window=window,
            mask=mask,
            sinks=sinks,
            positions=query_positions,
            segments=query_segments,
            fields=query_fields,
            return_lse=return_lse,
        )
    call = {
        "window": window,
        "mask": mask,
        "sinks": sinks,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_segments": query_segments,
        "key_segments": key_segments,
        "query_fields": query_fields,
        "key_fields": key_fields,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "return_lse": return_lse,
        "deterministic": deterministic,
    }
    out, lse = choose("softmax_attention", backend, BACKENDS, q, k, v, **call)(q, k, v, **call)
    return (out, lse) if return_lse else out


def _check(
    q, k, v, window, mask, sinks, query_positions, key_positions, query_segments, key_segments, query_fields, key_fields
) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"softmax_attention: {name} must have four dimensions; got {array.shape}")
    b, t, h, dim = q.shape
    s, groups = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != dim:
        raise ValueError(f"softmax_attention: k must be ({b}, s, g, {dim}) to fit q {q.shape}; got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"softmax_attention: v must be {k.shape[:3]} + (v,); got {v.shape}")
    if groups < 1 or h % groups:
        raise ValueError(f"softmax_attention: q has {h} heads, which is no multiple of the {groups} heads of k")
    if window is not None and window < 1:
        raise ValueError(f"softmax_attention: window must be at least 1, or None; got {window}")
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"softmax_attention: sinks must be {(h,)}; got {sinks.shape}")
    if mask is not None and window is not None:
        raise ValueError(
            f"softmax_attention: window={window} is given beside a mask, which takes its place: make it part of the mask"
        )
    is_mask_expression = is_expression(mask)
    if (
        mask is not None
        and not is_mask_expression
        and (mask.shape not in ((b, t, s), (1, t, s)) or mask.dtype != jnp.bool_)
    ):
        raise ValueError(
            f"softmax_attention: mask must be bool {(b, t, s)} or {(1, t, s)}; got {mask.dtype} {mask.shape}"
        )
    more = [
        (f"{side}_fields[{name!r}]", field, ((b, length), (1, length)))
        for side, fields, length in (("query", query_fields, t), ("key", key_fields, s))
        for name, field in (fields or {}).items()
    ]
    for name, field, shapes in [
        ("query_positions", query_positions, ((b, t),)),
        ("key_positions", key_positions, ((b, s),)),
        ("query_segments", query_segments, ((b, t),)),
        ("key_segments", key_segments, ((b, s),)),
        *more,
    ]:
        if field is not None and field.shape not in shapes:
            raise ValueError(f"softmax_attention: {name} must be {' or '.join(map(str, shapes))}; got {field.shape}")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("softmax_attention: query_segments and key_segments must be given together")
    if is_mask_expression:
        for side, fields, positions, segments in (
            ("query", query_fields, query_positions, query_segments),
            ("key", key_fields, key_positions, key_segments),
        ):
            had = {
                *(fields or {}),
                *(["segments"] if segments is not None else []),
                *(["positions"] if positions is not None or t == s else []),
            }
            missing = sorted(mask.fields - had)
            if missing:
                raise ValueError(
                    f"softmax_attention: the mask reads {missing[0]}, which neither {side}_fields nor another argument gives"
                )
    elif more:
        raise ValueError(f"softmax_attention: {more[0][0]} is given, but no mask expression that would read it")
    elif mask is None and t != s and (query_positions is None or key_positions is None):
        raise ValueError(
            f"softmax_attention: {t} queries and {s} keys need query_positions and key_positions, or a mask"
        )


__all__ = ["BACKENDS", "merge", "softmax_attention"]
