"""Attention of the chosen pairs by dense products of static sizes, by one of three strategies; static sizes decide
between them (`strategy`):

- "rows": queries gathered into tiles of one head each (head_groups.py). Ordered by their last tokens, the i-th tile
  sees at most a number of keys that is known when the program is traced (`ends`), so groups of tiles are batched
  products against the first so many keys, and about half of the square is left out as in dense causal attention. Each
  tile's head's keys are copied beside it, which costs 1 / tile of the products.
- "pairs": for decoding, the keys and values of the chosen heads alone.
- "dense": all heads, and zeros for what is not chosen, where too little would be skipped.

Numerics are those of softmax attention's xla backend: products in the inputs' dtype, sums and softmax in fp32.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.head_mixture_attention.head_groups import ends, group_by_head, tile_count
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax

TILE = 128
"""Rows per tile in long sequences."""

MOST_GROUPS = 16
"""Groups of tiles are unrolled in the program."""

GROUP_KEYS = 64
"""Keys by which groups differ, at least, on average."""

FEWEST_TOKENS = 256
"""In shorter sequences tiles would be small, and scores are little of a layer's work."""

Cuts = tuple[tuple[int, int, int], ...]
"""Returns (first, last + 1, keys seen) of groups of tiles."""


def strategy(t: int, s: int, heads: int, active: int, *, self_attention: bool) -> Literal["rows", "pairs", "dense"]:
    """Returns the strategy that computes least for t queries on s keys: a score costs no more in gathered tiles than in
    softmax attention's blocks."""
    if t * active < heads:
        return "pairs"
    if active >= heads or max(t, s) < FEWEST_TOKENS:
        return "dense"
    tile = tile_of(t, heads, active)
    if not self_attention:
        return "rows" if tile_count(t, heads, active, tile) * tile < heads * t else "dense"
    gathered = sum((last - first) * tile * seen for first, last, seen in groups(t, heads, active, tile))
    block = max(128, -(-t // 16))  # as softmax attention's xla backend goes
    dense = heads * sum(min(block, t - start) * min(start + block, t) for start in range(0, t, block))
    return "rows" if gathered < dense else "dense"


def tile_of(t: int, heads: int, active: int) -> int:
    """Rows per tile: at least two tiles per head under even routing, as half a tile per head is filler."""
    tile = TILE
    while tile > 16 and tile * heads * 2 > t * active:
        tile //= 2
    return tile


def groups(t: int, heads: int, active: int, tile: int) -> Cuts:
    """Returns (first, last + 1, keys seen) of groups of tiles, the latest first."""
    bounds = ends(t, heads, active, tile)
    size = -(-len(bounds) // max(1, min(MOST_GROUPS, t // GROUP_KEYS)))
    firsts = range(0, len(bounds), size)
    return tuple(
        (first, min(first + size, len(bounds)), max(1, min(t, -(-bounds[first] // 32) * 32))) for first in firsts
    )


def head_mixture_attention(
    q, k, v, chosen, *, active, key_heads, query_positions, key_positions, query_segments, key_segments, scale
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and the log-sum-exp; arguments as those of the public function."""
    self_attention = k.shape[1] == q.shape[1] and query_positions is key_positions and query_segments is key_segments
    which = strategy(q.shape[1], k.shape[1], q.shape[2], active, self_attention=self_attention)
    run = {"rows": by_rows, "pairs": by_pairs, "dense": by_all}[which]
    return run(
        q,
        k,
        v,
        chosen,
        active=active,
        key_heads=key_heads,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=scale,
    )


def by_all(
    q, k, v, chosen, *, active, key_heads, query_positions, key_positions, query_segments, key_segments, scale
) -> tuple[jax.Array, jax.Array]:
    """Computes all heads for all tokens."""
    if key_heads != tuple(head // max(1, q.shape[2] // k.shape[2]) for head in range(q.shape[2])):
        k, v = (x[:, :, list(key_heads)] for x in (k, v))
    out, lse = softmax_attention(
        q,
        k,
        v,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
        scale=scale,
        return_lse=True,
        backend="xla",
    )
    return jnp.where(chosen[..., None], out, 0), jnp.where(chosen, lse, -jnp.inf)


def by_rows(
    q,
    k,
    v,
    chosen,
    *,
    active,
    key_heads,
    query_positions,
    key_positions,
    query_segments,
    key_segments,
    scale,
    tile=None,
) -> tuple[jax.Array, jax.Array]:
    """Gathered queries, against keys stored up to the end of their tile in self-attention, else against all keys."""
    (b, t, h, _), s = q.shape, k.shape[1]
    self_attention = s == t and query_positions is key_positions and query_segments is key_segments
    tile = tile_of(t, h, active) if tile is None else tile
    head_tiles = group_by_head(chosen, active, tile)
    if self_attention:
        head_tiles = head_tiles.latest_first()
        cuts = groups(t, h, active, tile)
    else:
        cuts = ((0, head_tiles.tokens.shape[1], s),)
    rows = head_tiles.gather(q).reshape(*head_tiles.tokens.shape, -1)
    heads = jnp.asarray(key_heads, jnp.int32)[head_tiles.heads]
    fields = {"i": head_tiles.tokens if query_positions is None else head_tiles.field(query_positions)}
    fields["j"] = jnp.arange(s)[None] if key_positions is None else key_positions
    if query_segments is not None:
        fields |= {"query_segments": head_tiles.field(query_segments), "key_segments": key_segments}
    out, lse = _tiles(cuts, scale, rows, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), heads, fields)
    out, lse = out.reshape(b, -1, out.shape[3]).astype(q.dtype), lse.reshape(b, -1, 1)
    return head_tiles.combine(out), jnp.where(chosen, head_tiles.combine(lse)[..., 0], -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiles(
    cuts: Cuts, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, heads: jax.Array, fields: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Tiles of queries (b, n, tile, k) with keys (b, g, s, k) and values (b, g, s, v) of `heads` (b, n): outputs (b, n,
    tile, v) and log-sum-exps (b, n, tile), fp32.

    Weights before their division are kept for the way back, as dense attention's are; keys' copies and masks are not.
    """
    return _tiles_forward(cuts, scale, q, k, v, heads, fields)[0]


def _tiles_forward(cuts, scale, q, k, v, heads, fields):
    copies = zip(cuts, _copies(k, heads, cuts), _copies(v, heads, cuts), strict=True)
    parts = [_attend(q[:, cut[0] : cut[1]], keys, values, _allowed(fields, cut), scale) for cut, keys, values in copies]
    out, lse, total = (jnp.concatenate(x, axis=1) for x in list(zip(*parts, strict=True))[:3])
    return (out, lse), (q, k, v, heads, out, lse, total, [part[3] for part in parts])


def _tiles_backward(cuts, scale, kept, cotangents):
    q, k, v, heads, out, lse, total, all_weights = kept
    g_out, g_lse = cotangents
    wide = lse.dtype
    # Divided by the sum of weights a row, not a weight.
    delta = ((jnp.sum(g_out * out, axis=-1) - jnp.where(jnp.isfinite(lse), g_lse, 0)) / total)[..., None]
    g_out = (g_out / total[..., None]).astype(v.dtype)
    dq, dk, dv = [], None, None
    copies = zip(cuts, all_weights, _copies(k, heads, cuts), _copies(v, heads, cuts), strict=True)
    for (first, last, _), weights, keys, values in reversed(
        list(copies)
    ):  # those that see least first, so that sums grow once
        queries, g = q[:, first:last], g_out[:, first:last]
        d_scores = jnp.einsum("bntv,bnsv->bnts", g, values, preferred_element_type=wide)
        d_scores = (weights * (d_scores - delta[:, first:last]) * scale).astype(q.dtype)
        dq.append(jnp.einsum("bnts,bnsk->bntk", d_scores, keys, preferred_element_type=wide))
        is_of_head = (heads[:, None, first:last] == jnp.arange(k.shape[1])[:, None]).astype(wide)
        dk = _summed(dk, is_of_head, jnp.einsum("bnts,bntk->bnsk", d_scores, queries, preferred_element_type=wide))
        dv = _summed(dv, is_of_head, jnp.einsum("bnts,bntv->bnsv", weights, g, preferred_element_type=wide))
    return jnp.concatenate(dq[::-1], axis=1).astype(q.dtype), _whole(dk, k), _whole(dv, v), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _allowed(fields: dict[str, jax.Array], cut: tuple[int, int, int]) -> jax.Array:
    """Returns bool (b, tiles, tile, keys seen)."""
    first, last, seen = cut
    allowed = fields["i"][:, first:last, :, None] >= fields["j"][:, None, None, :seen]
    if "query_segments" in fields:
        segments = fields["query_segments"][:, first:last, :, None]
        allowed &= (segments == fields["key_segments"][:, None, None, :seen]) & (segments != 0)
    return allowed


def _copies(x: jax.Array, heads: jax.Array, cuts: Cuts) -> list[jax.Array]:
    """Returns for each cut what its tiles see: (b, tiles, keys seen, d) of x (b, g, s, d)."""
    batch = jnp.arange(x.shape[0])[:, None]
    return [x[:, :, :seen].at[batch, heads[:, first:last]].get(mode="promise_in_bounds") for first, last, seen in cuts]


def _summed(total: jax.Array | None, is_of_head: jax.Array, parts: jax.Array) -> jax.Array:
    """Returns a sum by key head (b, g, keys, d), of fewer keys or None, and to it a head's tiles of (b, tiles, keys,
    d): as a product with zeros and ones."""
    new = jnp.einsum("bgn,bnsd->bgsd", is_of_head, parts)
    return new if total is None else new + jnp.pad(total, ((0, 0), (0, 0), (0, new.shape[2] - total.shape[2]), (0, 0)))


def _whole(total: jax.Array | None, like: jax.Array) -> jax.Array:
    assert total is not None, "there is at least one group of tiles"
    return jnp.pad(total, ((0, 0), (0, 0), (0, like.shape[2] - total.shape[2]), (0, 0))).astype(like.dtype)


def _attend(q, k, v, allowed, scale) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q (..., t, k), k (..., s, k), v (..., s, v), allowed (..., t, s): fp32 outputs (..., t, v) and log-sum-exps (...,
    t); then the sums (..., t) that weights (..., t, s), in v's dtype, are to be divided by."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...tk,...sk->...ts", q, k, preferred_element_type=wide) * scale
    scores = jnp.where(allowed, scores, -jnp.inf)
    weights, total, lse = unnormalised_softmax(scores)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("...ts,...sv->...tv", weights, v, preferred_element_type=wide) / total[..., None]
    return out, lse, total, weights


def by_pairs(
    q, k, v, chosen, *, active, key_heads, query_positions, key_positions, query_segments, key_segments, scale
) -> tuple[jax.Array, jax.Array]:
    """Attends from each pair to the keys of its head."""
    (b, t, h, _), s = q.shape, k.shape[1]
    heads = jnp.argsort(~chosen, axis=2, stable=True)[..., : min(active, h)]
    queries = jnp.take_along_axis(q, heads[..., None], axis=2)[..., None, :]
    batch = jnp.arange(b)[:, None, None]
    keys, values = (
        x.at[batch, :, jnp.asarray(key_heads, jnp.int32)[heads]].get(mode="promise_in_bounds") for x in (k, v)
    )
    i = jnp.arange(t)[None] if query_positions is None else query_positions
    j = jnp.arange(s)[None] if key_positions is None else key_positions
    allowed = i[:, :, None] >= j[:, None]
    if query_segments is not None:
        allowed &= (query_segments[:, :, None] == key_segments[:, None]) & (query_segments != 0)[:, :, None]
    out, lse, *_ = _attend(queries, keys, values, allowed[:, :, None, None], scale)
    place = jnp.maximum(jnp.cumsum(chosen, axis=2) - 1, 0)
    out = jnp.take_along_axis(out[..., 0, :], place[..., None], axis=2)
    lse = jnp.take_along_axis(lse[..., 0], place, axis=2)
    return jnp.where(chosen[..., None], out, 0).astype(q.dtype), jnp.where(chosen, lse, -jnp.inf)
