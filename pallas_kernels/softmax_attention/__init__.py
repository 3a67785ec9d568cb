"""Softmax attention of every kind: full causal, windowed, inside documents, with sinks, or with any mask; queries may
share key heads (GQA) and read a cache.

    o_i = sum_j w_ij v_j,   w_ij = [j seen by i] exp(s_ij) / (exp(z_h) + sum over seen j' of exp(s_ij'))
    s_ij = scale q_i . k_j + bias_ij

Vaswani et al. 2017, equation 1. z_h is a sink: a learned logit per head that takes weight and gives no value, so that a
head may attend to little (gpt-oss; Agarwal et al. 2025); without sinks exp(z_h) is absent. Query i sees key j when, by
positions, j <= i and i - j < window, and both are of one document.

Easy to get wrong: a window of w sees w keys, the query's own included; query head i uses key head i // (h / g); a query
that sees no key gives zeros; the log-sum-exp includes the sink, so that parts with sinks cannot be merged by it twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.masks import Mask
from recollect.pallas_kernels.scheduled_attention.block_schedule import Fields
from recollect.pallas_kernels.scheduled_attention.merge_parts import merge
from recollect.pallas_kernels.segments import KnownArray
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
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    window: int | None = None,
    mask: Bool[Array, "#b t s"] | Mask | None = None,
    sinks: Float[Array, " h"] | None = None,
    bias: Float[Array, "#b #h t s"] | None = None,
    dropout: Float[Array, "#b #h t s"] | None = None,
    query_positions: Int[KnownArray, "b t"] | None = None,
    key_positions: Int[KnownArray, "b s"] | None = None,
    query_segments: Int[KnownArray, "b t"] | None = None,
    key_segments: Int[KnownArray, "b s"] | None = None,
    query_fields: Fields | None = None,
    key_fields: Fields | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Any:
    """Computes softmax attention, sequence first.

    Self-attention is recognised when t == s and the key fields are left out (they are then the queries') or are the
    very arrays given for the queries. In self-attention without a mask a document's tokens are contiguous but for
    padding, and their positions increase: keys stored after a query are taken to be hidden from it, which saves half of
    the work, or all but the window's. Use `mask` for anything else. Where a mesh splits tokens, a window's keys are
    also taken to stand fewer than `window` places before the query: no padding inside of a document.

    Args:
      q: (b, t, h, k). k: (b, s, g, k) and v: (b, s, g, v), h a multiple of g.
      window: keys that a query sees, itself included; None is all before it.
      mask: takes the place of causality, window and segments: an expression over token fields
        (pallas_kernels/masks.py), of which only tiles that may hold a visible pair are computed; or (b or 1, t, s)
        bool, True where seen. Padding is seen by nobody.
      sinks: (h,) logits.
      bias: (b or 1, h or 1, t, s), added to the scaled scores; -inf hides a key from a head. Kernels take none.
      dropout: (b or 1, h or 1, t, s), what weights w_ij are multiplied by: 0 or 1 / (1 - share). Kernels take none.
      query_positions, key_positions: (b, t) and (b, s) int; None counts from 0, and needs t == s.
      query_segments, key_segments: (b, t) and (b, s) int, 0 is padding, which may hold NaN; None is one document.
      query_fields, key_fields: what else a mask expression reads, name -> (b or 1, t) and (b or 1, s) int.
      scale: of the scores; None is k^(-1/2).
      deterministic: refuse backends whose gradients may differ from run to run in their last bits (cuDNN's).
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      (b, t, h, v) in q's dtype, zeros for padded queries and for those that see no key; with `return_lse` also the
      logarithm of the softmax denominator (b, t, h) fp32, -inf where nothing is seen (the sink counts as seen, except
      by padded queries).

    Raises:
      ValueError: an argument's shape, type or value does not fit; the backend cannot serve the call.
    """
    given: dict[str, Any] = {"query_positions": query_positions, "key_positions": key_positions}
    given |= {"query_segments": query_segments, "key_segments": key_segments}
    given |= {"query_fields": query_fields, "key_fields": key_fields}
    call: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "deterministic": deterministic}
    if isinstance(mask, Mask) and mask.differs_by_head:
        from recollect.pallas_kernels.softmax_attention.per_head import by_head

        pairs = {"sinks": sinks, "bias": bias, "dropout": dropout}
        return by_head(softmax_attention, q, k, v, mask, pairs, window=window, backend=backend, **given, **call)
    fields = with_key_fields(q, k, **given)
    _check(q, k, v, window, mask, sinks, bias, dropout, **fields)
    seen: dict[str, Any] = {"window": window, "mask": mask, "sinks": sinks, "bias": bias, "dropout": dropout}
    if is_self_attention(q, k, fields) and sequence_parts(q.shape[1]) > 1:
        part = functools.partial(softmax_attention, **call, backend=backend)
        seen |= {"positions": query_positions, "segments": query_segments, "fields": query_fields}
        return sequence_parallel.over_devices(part, q, k, v, **seen, return_lse=return_lse)
    call |= {**seen, **fields, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    out, lse = choose("softmax_attention", backend, BACKENDS, q, k, v, **call)(q, k, v, **call)
    return (out, lse) if return_lse else out


def _check(q, k, v, window, mask, sinks, bias, dropout, *, query_fields, key_fields, **fields) -> None:
    check_attention("softmax_attention", q, k, v, fields)
    (_, t, h, _), s = q.shape, k.shape[1]
    if window is not None and window < 1:
        raise ValueError(f"softmax_attention: window must be at least 1, or None; got {window}")
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"softmax_attention: sinks must be {(h,)}; got {sinks.shape}")
    if bias is not None or dropout is not None or mask is not None or query_fields or key_fields:
        from recollect.pallas_kernels.softmax_attention.mask_arguments import check_mask

        check_mask(q, k, mask, window, {"bias": bias, "dropout": dropout}, fields, query_fields, key_fields)
    if mask is None and t != s and (fields["query_positions"] is None or fields["key_positions"] is None):
        needed = "query_positions and key_positions, or a mask"
        raise ValueError(f"softmax_attention: {t} queries and {s} keys need {needed}")


def with_key_fields(q: jax.Array, k: jax.Array, **fields: Any) -> dict[str, Any]:
    """Returns the fields; where there are as many keys as queries, a key field that is None is the query's."""
    if not (q.ndim == k.ndim == 4 and q.shape[1] == k.shape[1]):
        return fields
    of_queries = {name: fields[f"query_{name[4:]}"] for name in fields if name.startswith("key_")}
    return {name: of_queries.get(name) if field is None else field for name, field in fields.items()}


def is_self_attention(q: jax.Array, k: jax.Array, fields: Mapping[str, Any]) -> bool:
    """Returns whether keys are the queries' tokens: as many, and each key field is the very array of the query's."""
    pairs = [(fields[f"key_{name[6:]}"], field) for name, field in fields.items() if name.startswith("query_")]
    return q.shape[1] == k.shape[1] and all(of_keys is of_queries for of_keys, of_queries in pairs)


def check_attention(
    operation: str, q: jax.Array, k: jax.Array, v: jax.Array, fields: Mapping[str, Any], *, grouped: bool = True
) -> None:
    """Checks the shapes of q (b, t, h, k), k (b, s, g, k), v (b, s, g, v), positions and segments (b, t) and (b, s).

    Raises:
      ValueError: a shape does not fit, h is no multiple of g where heads are `grouped`, or segments of one side only
        are given; the message begins with the operation's name.
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{operation}: {name} must have four dimensions; got {array.shape}")
    (b, t, h, dim), (s, groups) = q.shape, k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != dim:
        raise ValueError(f"{operation}: k must be ({b}, s, g, {dim}) to fit q {q.shape}; got {k.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{operation}: v must be {k.shape[:3]} + (v,); got {v.shape}")
    if grouped and (groups < 1 or h % groups):
        raise ValueError(f"{operation}: q has {h} heads, which is no multiple of the {groups} heads of k")
    for name, field in fields.items():
        shape = (b, t if name.startswith("query") else s)
        if field is not None and field.shape != shape:
            raise ValueError(f"{operation}: {name} must be {shape}; got {field.shape}")
    if (fields["query_segments"] is None) != (fields["key_segments"] is None):
        raise ValueError(f"{operation}: query_segments and key_segments must be given together")


def is_expression(mask: Any) -> bool:
    """Returns whether a mask is an expression over token fields, not an array of pairs."""
    return hasattr(mask, "allows")


__all__ = ["BACKENDS", "merge", "softmax_attention"]
