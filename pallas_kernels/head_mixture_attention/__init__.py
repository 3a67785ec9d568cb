"""Causal softmax attention of heads that tokens choose: only the chosen (token, head) pairs are computed (Jin et al.
2024, MoH, equation 4).

    o_ih = g_ih [i chose h] sum_{j <= i} softmax_j(scale q_ih . k_j,kappa(h)) v_j,kappa(h),

kappa(h) the key head of head h, g its gates. Public implementations compute every head for every token and multiply by
zeros. Here the queries of a head's tokens are gathered, sorted by position, into tiles of one head each
(head_groups.py), a list whose static length holds every routing: at most `active` choices per token, none ever dropped.
Causal bounds of tiles come from their tokens' positions; keys and values are those of all tokens, shared, since a later
token may choose any head. Putting results back is a gather too, as each pair has one row.

Easy to get wrong: a padded token takes no row; what a query sees does not depend on who chose what, so keys are never
skipped by routing; an output's last bits may depend on which tile its query fell into, and so on later tokens' choices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recollect.pallas_kernels.all_gather_kv import over_gathered_keys
from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.segments import KnownArray, zero_padding
from recollect.pallas_kernels.softmax_attention import (
    check_attention,
    is_self_attention,
    with_key_fields,
)


def head_mixture_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    chosen: Bool[Array, "b t h"],
    *,
    active: int,
    gates: Float[Array, "b t h"] | None = None,
    key_heads: Sequence[int] | None = None,
    query_positions: Int[KnownArray, "b t"] | None = None,
    key_positions: Int[KnownArray, "b s"] | None = None,
    query_segments: Int[KnownArray, "b t"] | None = None,
    key_segments: Int[KnownArray, "b s"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Computes attention of the chosen heads, sequence first. Self-attention is recognised, with the same promises, as
    in `softmax_attention`.

    Args:
      q: (b, t, h, k), the routed heads. k: (b, s, g, k) and v: (b, s, g, v).
      chosen: (b, t, h) bool, at most `active` true a token. It carries no gradient.
      active: the most heads that a token chooses, known when the program is traced.
      gates: (b, t, h), what outputs are multiplied by; None is 1.
      key_heads: for each head of q the head of k and v it attends with; None: head // (h / g), h a multiple of g.
      query_positions, key_positions: (b, t) and (b, s) int; None counts from 0, and needs t == s.
      query_segments, key_segments: (b, t) and (b, s) int, 0 is padding, which may hold NaN; None is one document.
      scale: of the scores; None is k^(-1/2).
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      (b, t, h, v) in q's dtype, zeros for pairs that are not chosen and for padding; with `return_lse` also the
      logarithm of the softmax denominator (b, t, h) fp32, -inf there.

    Raises:
      ValueError: an argument's shape, type or value does not fit, or the backend cannot serve the call.
    """
    fields = with_key_fields(
        q,
        k,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
    )
    _check(q, k, v, chosen, active, gates, key_heads, fields)
    h, dim = q.shape[2:]
    kappa = (
        tuple(head // (h // k.shape[2]) for head in range(h))
        if key_heads is None
        else tuple(int(head) for head in key_heads)
    )
    if is_self_attention(q, k, fields) and sequence_parts(q.shape[1]) > 1:
        regular = h % k.shape[2] == 0 and kappa == tuple(head // (h // k.shape[2]) for head in range(h))
        part: Any = functools.partial(
            head_mixture_attention,
            active=active,
            key_heads=None if regular else kappa,
            scale=scale,
            return_lse=return_lse,
            backend=backend,
        )
        return over_gathered_keys(
            part,
            q,
            k,
            v,
            positions=query_positions,
            segments=query_segments,
            return_lse=return_lse,
            heads="h" if regular else "r",
            chosen=chosen,
            gates=gates,
        )
    if query_segments is not None:
        chosen = chosen & (query_segments != 0)[:, :, None]
        q = zero_padding(q, query_segments)
        k, v = (zero_padding(x, fields["key_segments"]) for x in (k, v))
    arguments = {
        "active": min(active, h),
        "key_heads": kappa,
        **fields,
        "scale": dim**-0.5 if scale is None else float(scale),
    }
    run = choose("head_mixture_attention", backend, BACKENDS, q, k, v, chosen, **arguments)
    out, lse = run(q, k, v, chosen, **arguments)
    if gates is not None:
        # By where: a gate of padding may be anything.
        out = (out * jnp.where(chosen, gates, 0)[..., None]).astype(q.dtype)
    return (out, lse) if return_lse else out


def skips(t: int, s: int, heads: int, active: int, *, self_attention: bool) -> bool:
    """Returns whether anything is skipped, so that it pays to compute shared heads separately: decided from static
    sizes, see xla.strategy.

    Args:
      t, s: queries and keys. heads, active: routed heads, and how many a token chooses. self_attention: as
        `head_mixture_attention` recognises it.
    """
    from recollect.pallas_kernels.head_mixture_attention import xla

    return xla.strategy(t, s, heads, active, self_attention=self_attention) != "dense"


BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.head_mixture_attention.gpu",
    "pallas_tpu": "recollect.pallas_kernels.head_mixture_attention.tpu",
    "xla": "recollect.pallas_kernels.head_mixture_attention.xla",
    "reference": "recollect.pallas_kernels.head_mixture_attention.reference",
}


def _check(q, k, v, chosen, active, gates, key_heads, fields) -> None:
    name = "head_mixture_attention"
    check_attention(name, q, k, v, fields, grouped=False)
    (b, t, h, _), (s, groups) = q.shape, k.shape[1:3]
    if t < 1 or s < 1 or h < 1:
        raise ValueError(f"{name}: q and k must hold tokens, and q heads; got {q.shape} and {k.shape}")
    if key_heads is None and (groups < 1 or h % groups):
        raise ValueError(f"{name}: q has {h} heads, which is no multiple of the {groups} heads of k; name key_heads")
    if key_heads is not None and (len(key_heads) != h or not all(0 <= head < groups for head in key_heads)):
        raise ValueError(f"{name}: key_heads must be {h} numbers from 0 to {groups - 1}; got {tuple(key_heads)}")
    if chosen.shape != (b, t, h) or chosen.dtype != jnp.bool_:
        raise ValueError(f"{name}: chosen must be bool {(b, t, h)}; got {chosen.dtype} {chosen.shape}")
    if active < 1:
        raise ValueError(f"{name}: active must be at least 1; got {active}")
    if gates is not None and gates.shape != (b, t, h):
        raise ValueError(f"{name}: gates must be {(b, t, h)}; got {gates.shape}")
    if t != s and (fields["query_positions"] is None or fields["key_positions"] is None):
        raise ValueError(f"{name}: {t} queries and {s} keys need query_positions and key_positions")


__all__ = ["BACKENDS", "head_mixture_attention", "skips"]
