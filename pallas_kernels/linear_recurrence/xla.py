"""The chunked form: masked products inside chunks of c tokens, one state a chunk between them; memory linear in length.

With G the running sum of log decay inside a chunk, and S the state before it,

    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j,      S' = exp(G_c) S + sum_j exp(G_c - G_j) k_j v_j^T.

Exponents are at most 0 when decays are: exp(-G_j) is never formed alone. Documents inside a chunk: a pair needs equal segments, the
state is read by tokens of its own segment only, and only the last segment's tokens enter the next state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def chunked(
    q,
    k,
    v,
    *,
    log_decay=None,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=64,
) -> tuple[jax.Array, jax.Array | None]:
    """See the front door for the arguments."""
    b, t, h, key_dim = q.shape
    value_dim = v.shape[3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * jnp.asarray(scale, q.dtype)
    segments = None
    if segment_ids is not None:
        real = segment_ids != 0
        q, k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (q, k, v))
        first = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment
        segments = _carry(segment_ids, first)
    g = None
    if log_decay is not None:
        g = jnp.broadcast_to(log_decay, (b, t, h)).astype(wide)
        if segment_ids is not None:
            g = jnp.where(real[:, :, None], g, 0)

    c = min(chunk_size, t)
    n = -(-t // c)
    padded = n * c - t
    if padded:
        # Trailing zeros write nothing and decay nothing; their segment is the last one, so the final state is right.
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))) for x in (q, k, v))
        g = None if g is None else jnp.pad(g, ((0, 0), (0, padded), (0, 0)))
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded)), mode="edge")
    q, k, v = (x.reshape(b, n, c, h, -1) for x in (q, k, v))
    total = None if g is None else jnp.cumsum(g.reshape(b, n, c, h), axis=2)
    segments = None if segments is None else segments.reshape(b, n, c)

    scores = jnp.einsum("bnihk,bnjhk->bnhij", q, k, preferred_element_type=wide)
    seen = jnp.tril(jnp.ones((c, c), bool))
    if segments is not None:
        seen = (seen & (segments[:, :, :, None] == segments[:, :, None, :]))[:, :, None]
    if total is not None:
        exponent = jnp.moveaxis(total, 3, 2)
        exponent = exponent[..., :, None] - exponent[..., None, :]
        # A token's weight on itself is the constant 1: a gradient through G_i - G_i would cancel only up to rounding, and under a
        # strong decay the rest is smaller than that.
        exponent = jnp.where(jnp.eye(c, dtype=bool), 0, exponent)
        scores = scores * jnp.exp(jnp.where(seen, exponent, -jnp.inf))
    else:
        scores = jnp.where(seen, scores, 0)
    o = jnp.einsum("bnhij,bnjhv->bnihv", scores.astype(v.dtype), v, preferred_element_type=wide)

    if n > 1 or initial_state is not None or return_state:
        writes, keeps, reads = _weights(total, segments, initial_segment, initial_state is not None)
        written = k.astype(wide) if writes is None else k.astype(wide) * writes[..., None]
        updates = jnp.einsum("bnjhk,bnjhv->bnhkv", written, v.astype(wide), preferred_element_type=wide)
        state = jnp.zeros((b, h, key_dim, value_dim), wide) if initial_state is None else initial_state.astype(wide)
        before, state = _states(state, updates, keeps)
        if n > 1 or initial_state is not None:
            read = q.astype(wide) if reads is None else q.astype(wide) * reads[..., None]
            o = o + jnp.einsum("bnihk,bnhkv->bnihv", read, before, preferred_element_type=wide)
    else:
        state = None
    o = o.reshape(b, n * c, h, value_dim)[:, :t].astype(v.dtype)
    return o, state if return_state else None


def _weights(total, segments, initial_segment, has_state):
    """Per token the weight of its write to the chunk's end (b, n, c, h) and of its read of the state before the chunk, and per
    chunk the share of that state that is kept (b, n, h); None stands for ones."""
    writes = reads = keeps = None
    if total is not None:
        is_last = (jnp.arange(total.shape[2]) == total.shape[2] - 1)[:, None]
        writes = jnp.exp(jnp.where(is_last, 0, total[:, :, -1:] - total))  # the last token's weight is constant, as above
        reads, keeps = jnp.exp(total), jnp.exp(total[:, :, -1])
    if segments is not None:
        last = segments[:, :, -1]
        first = initial_segment if initial_segment is not None and has_state else jnp.zeros_like(last[:, 0])
        before = jnp.concatenate([first[:, None], last[:, :-1]], axis=1)
        same_end, same_start = segments == last[:, :, None], segments == before[:, :, None]
        one = jnp.ones((), jnp.float32) if total is None else 1
        writes = jnp.where(same_end[..., None], one if writes is None else writes, 0)
        reads = jnp.where(same_start[..., None], one if reads is None else reads, 0)
        keeps = jnp.where((last == before)[..., None], one if keeps is None else keeps, 0)
    return writes, keeps, reads


def _states(state, updates, keeps):
    """States before each chunk (b, n, h, k, v), and the one after the last."""
    if updates.shape[1] == 1:
        kept = state if keeps is None else keeps[:, 0, :, None, None] * state
        return state[:, None], kept + updates[:, 0]

    def step(state, chunk):
        update, keep = chunk
        kept = state if keep is None else keep[..., None, None] * state
        return kept + update, state

    xs = (jnp.moveaxis(updates, 1, 0), None if keeps is None else jnp.moveaxis(keeps, 1, 0))
    state, before = jax.lax.scan(step, state, xs)
    return jnp.moveaxis(before, 0, 1), state


def _carry(segment_ids, first):
    """Segments in which padding takes the segment before it; `first` (b,) stands before the row."""
    index = jax.lax.cummax(jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    return jnp.where(index >= 0, jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1), first[:, None])
