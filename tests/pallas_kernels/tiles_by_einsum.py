"""The kernels of pallas_kernels/scheduled_attention/flash_vjp.py in plain jnp: what those of tpu.py and gpu.py must
equal.

A mask is asked for on partial tiles alone, as there, so that a schedule that calls a tile full or empty wrongly shows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.scheduled_attention.block_schedule import Visits, tile_allows


def _seen(visits: Visits, query_fields, key_fields, settings, n, s, transposed=False) -> jax.Array:
    """(b', g', n, s): what the visited tiles allow."""
    query_tile, key_tile = settings.query_tile, settings.key_tile
    own, others = (s // key_tile, n // query_tile) if transposed else (n // query_tile, s // key_tile)
    count, index, partial = (jnp.asarray(x) for x in (visits.count, visits.index, visits.partial))
    within = jnp.arange(index.shape[-1]) < count[..., None]
    hit = within[..., None] & (index[..., None] == jnp.arange(others))  # (b', g', own, m, others)
    visited = hit.any(axis=3)
    looked_at = (hit & (partial[..., None] == 1)).any(axis=3)
    assert index.shape[2] == own
    if transposed:
        visited, looked_at = (jnp.swapaxes(x, 2, 3) for x in (visited, looked_at))

    def spread(x):
        return jnp.repeat(jnp.repeat(x, query_tile, axis=2), key_tile, axis=3)

    query = {name: jnp.asarray(x)[:, :, None] for name, x in query_fields.items()}
    key = {name: jnp.asarray(x)[:, None, :] for name, x in key_fields.items()}
    allowed = tile_allows(settings.mask, query, key)
    allowed = jnp.broadcast_to(allowed, (allowed.shape[0], n, s))[:, None]
    return spread(visited) & (allowed | ~spread(looked_at))


def _heads(x, h, key_heads, settings):
    """Keys or values as each query sees them: (b, h, s, d), or for gathered queries (b, n, s, d)."""
    x = jnp.swapaxes(x.astype(jnp.float32), 1, 2)
    if key_heads is None:
        return jnp.repeat(x, h // x.shape[1], axis=1)
    rows = jnp.repeat(key_heads, settings.query_tile, axis=1)
    return jnp.take_along_axis(x, rows[:, :, None, None], axis=1)


def _products(x, y, key_heads):
    """Queries' side x (b, n, h, d) with keys' side y: (b, h, n, s)."""
    x = x.astype(jnp.float32)
    if key_heads is None:
        return jnp.einsum("bnhd,bhsd->bhns", x, y)
    return jnp.einsum("bnd,bnsd->bns", x[:, :, 0], y)[:, None]


def forward(q, k, v, sinks, visits, key_heads, query_fields, key_fields, settings):
    n, h, s = q.shape[1], q.shape[2], k.shape[1]
    seen = _seen(visits, query_fields, key_fields, settings, n, s)
    scores = settings.scale * _products(q, _heads(k, h, key_heads, settings), key_heads)
    scores = jnp.where(seen, scores, -jnp.inf)
    if settings.block is not None:
        gates, inner = _in_blocks(scores, settings)
        some, lse = _log_sum_exp(gates)
        weights = (jnp.where(some[..., None], jnp.exp(gates - lse[..., None]), 0)[..., None] * inner).reshape(
            scores.shape
        )
    else:
        if sinks is not None:
            scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], axis=-1)
        some, lse = _log_sum_exp(scores)
        weights = jnp.where(some[..., None], jnp.exp(scores - lse[..., None]), 0)[..., :s]
    values = _heads(v, h, key_heads, settings)
    if key_heads is None:
        o = jnp.einsum("bhns,bhsv->bnhv", weights, values)
    else:
        o = jnp.einsum("bns,bnsv->bnv", weights[:, 0], values)[:, :, None]
    return o.astype(q.dtype), jnp.where(some, lse, -jnp.inf)


def _log_sum_exp(scores):
    some = jnp.any(scores > -jnp.inf, axis=-1)
    return some, jax.nn.logsumexp(jnp.where(some[..., None], scores, 0), axis=-1)


def _in_blocks(scores, settings):
    """Landmarks' scores (..., blocks), and softmaxes over ordinary ones (..., blocks, slots), 0 where a block is not
    seen."""
    scores = scores.reshape(*scores.shape[:-1], -1, settings.key_tile)
    ordinary = jnp.arange(settings.key_tile) < settings.block
    inner = jnp.where(ordinary & (scores > -jnp.inf), scores, -jnp.inf)
    some = jnp.any(inner > -jnp.inf, axis=-1, keepdims=True)
    return scores[..., settings.block], jnp.where(some, jax.nn.softmax(jnp.where(some, inner, 0), axis=-1), 0)


def _ds(q, k, v, do, lse, delta, seen, key_heads, settings):
    h = q.shape[2]
    scores = settings.scale * _products(q, _heads(k, h, key_heads, settings), key_heads)
    if settings.block is not None:
        gates, inner = _in_blocks(jnp.where(seen, scores, -jnp.inf), settings)
        gates = jnp.exp(gates - lse[..., None])[..., None]
        dots = _products(do, _heads(v, h, key_heads, settings), key_heads).reshape(inner.shape)
        averages = jnp.sum(inner * dots, axis=-1, keepdims=True)
        is_landmark = jnp.arange(settings.key_tile) == settings.block
        ds = gates * jnp.where(is_landmark, averages - delta[..., None, None], inner * (dots - averages))
        return (gates * inner).reshape(scores.shape), ds.reshape(scores.shape)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
    return weights, weights * (_products(do, _heads(v, h, key_heads, settings), key_heads) - delta[..., None])


def query_gradient(q, k, v, do, lse, delta, visits, key_heads, query_fields, key_fields, settings):
    seen = _seen(visits, query_fields, key_fields, settings, q.shape[1], k.shape[1])
    ds = _ds(q, k, v, do, lse, delta, seen, key_heads, settings)[1] * settings.scale
    keys = _heads(k, q.shape[2], key_heads, settings)
    if key_heads is None:
        return jnp.einsum("bhns,bhsk->bnhk", ds, keys).astype(q.dtype)
    return jnp.einsum("bns,bnsk->bnk", ds[:, 0], keys)[:, :, None].astype(q.dtype)


def key_gradients(q, k, v, do, lse, delta, visits, key_heads, query_fields, key_fields, settings):
    b, n, h, _ = q.shape
    s, g = k.shape[1:3]
    seen = _seen(visits, query_fields, key_fields, settings, n, s, transposed=True)
    if key_heads is None:
        weights, ds = _ds(q, k, v, do, lse, delta, seen, None, settings)
        dk = jnp.einsum("bhns,bnhk->bshk", ds * settings.scale, q.astype(jnp.float32))
        dv = jnp.einsum("bhns,bnhv->bshv", weights, do.astype(jnp.float32))
        dk, dv = (x.reshape(b, s, g, h // g, -1).sum(axis=3) for x in (dk, dv))
    else:
        # The schedule itself, (b, g, n, s), says which key head a query belongs to.
        weights, ds = (x for x in _ds(q, k, v, do, lse, delta, seen.any(axis=1, keepdims=True), key_heads, settings))
        weights, ds = (jnp.where(seen, x, 0) for x in (weights, ds))
        dk = jnp.einsum("bgns,bnk->bsgk", ds * settings.scale, q[:, :, 0].astype(jnp.float32))
        dv = jnp.einsum("bgns,bnv->bsgv", weights, do[:, :, 0].astype(jnp.float32))
    return dk.astype(k.dtype), dv.astype(v.dtype)
