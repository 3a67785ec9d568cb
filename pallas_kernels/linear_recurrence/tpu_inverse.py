"""The delta rule's triangular systems (walks.Solve) in XLA, fp32."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.linear_recurrence.triangles import decayed_products, running_total, since_start, to_end, unit_inverse_by_ladder
from pallas_kernels.linear_recurrence.walks import Chunks, Solved


def solve(e, k, v, chunks: Chunks, *, heads: int, strength=None, log_decay=None, keeps: bool = True) -> Solved:
    """See walks.Solve; the inverse is (b, t / c, heads, c, c) fp32."""
    total = None
    if log_decay is not None:
        total = running_total(log_decay, chunks.size)
        chunks = dataclasses.replace(chunks, total=total)
    g = _steps(chunks)
    like = (e, v)
    e, k, v, strength = (_in_chunks(x, chunks.size, heads) for x in (e, k, v, None if strength is None else strength[..., None]))
    inverse = _inverse(e, k, g, chunks)
    w = _times(inverse, _weighed(e, g, chunks, to_start=True))
    u = _times(inverse, v if strength is None else strength * v)
    return Solved(_flat(w, like[0]), _flat(u, like[1]), inverse if keeps else None, total)


def solve_transposed(inverse, q, k, do, chunks: Chunks, *, heads: int, scale: float = 1.0) -> Solved:
    """See walks.SolveTransposed."""
    g, like = _steps(chunks), (k, do)
    q, k, do = (_in_chunks(x, chunks.size, heads) for x in (q, k, do))
    transposed = jnp.swapaxes(inverse, -1, -2)
    scores = decayed_products(q, k, g, _same(chunks), jnp.float32)
    u = scale * _times(transposed, _times(jnp.swapaxes(scores, -1, -2), do))
    w = _times(transposed, _weighed(k, g, chunks, to_start=False))
    return Solved(_flat(w, like[0]), _flat(u, like[1]))


def _steps(chunks: Chunks):
    """The log decay of each token, (b, n, c, h, 1 | k)."""
    if chunks.total is None:
        return None
    total = jnp.moveaxis(chunks.total, 1, 2)[..., None] if chunks.decay == "head" else chunks.total
    total = total.reshape(total.shape[0], -1, chunks.size, *total.shape[2:])
    return jnp.diff(total, axis=2, prepend=0)


def _in_chunks(x, c: int, heads: int):
    if x is None:
        return None
    b, t, h, d = x.shape
    return jnp.repeat(x, heads // h, axis=2).reshape(b, t // c, c, heads, d)


def _flat(x, like):
    """(b, n, c, h, d) as `like` has it, (b, t, h, d) in its dtype."""
    return x.reshape(like.shape[0], like.shape[1], *x.shape[3:]).astype(like.dtype)


def _times(matrix, x):
    return jnp.einsum("bnhij,bnjhd->bnihd", matrix, x.astype(jnp.float32), precision="highest")


def _inverse(e, k, g, chunks: Chunks):
    """(I + L_ek)^-1 of every chunk, (b, n, h, c, c) fp32."""
    earlier = jnp.tril(jnp.ones((chunks.size,) * 2, bool), -1)
    same = _same(chunks)
    return unit_inverse_by_ladder(decayed_products(e, k, g, earlier if same is None else same & earlier, jnp.float32))


def _same(chunks: Chunks):
    if chunks.segments is None:
        return None
    b, t = chunks.segments.shape
    segments = chunks.segments.reshape(b, t // chunks.size, 1, chunks.size)
    return segments[..., :, None] == segments[..., None, :]


def _weighed(x, g, chunks: Chunks, *, to_start: bool):
    """x times the decay since its chunk's start (to its end), 0 for documents that do not reach there."""
    x = x.astype(jnp.float32)
    if g is not None:
        x = x * jnp.exp(since_start(g) if to_start else to_end(g))
    reach = chunks.starts if to_start else chunks.ends
    return x if reach is None else x * reach.reshape(*x.shape[:3], 1, 1)
