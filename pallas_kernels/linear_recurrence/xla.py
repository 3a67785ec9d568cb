"""The chunked form: masked products inside chunks of c tokens, one state a chunk between them; memory linear in length.

On CPUs chunks are computed one after the other, elsewhere all at once but for their states.

With G the running sum of log decay inside a chunk, S the state before it, and nothing erased,

    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j,      S' = exp(G_c) S + sum_j exp(G_c - G_j) k_j v_j^T.

What is erased, n_i = S'_i^T e_i, obeys a triangular system inside the chunk (the WY form of Yang et al. 2024,
"Parallelizing linear transformers with the delta rule", with e and u apart):

    (I + L_eu) n = exp(G) e S + L_ek v,      (L_xy)_ij = x_i . exp(G_i - G_j) y_j  for j < i, else 0,

and -n^T is written with u as v^T is with k. For u = k this is one write, of v - n = (I + L)^-1 (v - exp(G) e S).

Exponents are at most 0 when decays are: exp(-G_j) is never formed alone. Documents inside a chunk: a pair needs equal
segments, the state is read by tokens of its own segment only, and only the last segment's tokens enter the next state.

Where the erase reads the undecayed state, exp(G_i) becomes exp(G_{i-1}) in the system. A decay C of the state's columns
multiplies v_j by exp(C_i - C_j), a channel at a time; with erasing, each column would have a system of its own, which
is refused.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import device
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import (
    before_decay,
    decayed_products,
    decayed_sums,
    products_before_decay,
    since_start,
    to_end,
    unit_inverse,
)
from recollect.pallas_kernels.masks import carry_segments as carried

CHUNK = 64


def chunked(
    q,
    k,
    v,
    *,
    log_decay=None,
    value_log_decay=None,
    write_strength=None,
    erase_read=None,
    erase_write=None,
    erase_before_decay=False,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """See the front door for the arguments."""
    b, t, h, value_dim = v.shape
    key_dim = q.shape[3]
    dtype, wide = v.dtype, jnp.promote_types(q.dtype, jnp.float32)
    if write_strength is not None:
        strength = by_channel(write_strength, wide)
        if segment_ids is not None:
            # Before the product: what padding holds, NaN included, must not reach a gradient either.
            real = (segment_ids != 0)[:, :, None, None]
            strength, v = jnp.where(real, strength, 0), jnp.where(real, v, 0)
        v = (strength * v).astype(dtype)
    q = q * jnp.asarray(scale, q.dtype)
    rows = {"q": q, "k": k, "v": v, "e": erase_read, "u": erase_write}
    rows = {
        name: x if name == "v" else jnp.repeat(x, h // x.shape[2], axis=2) for name, x in rows.items() if x is not None
    }
    if log_decay is not None:
        rows["g"] = jnp.broadcast_to(
            by_channel(log_decay, wide), (b, t, h, log_decay.shape[3] if log_decay.ndim == 4 else 1)
        )
    if value_log_decay is not None:
        rows["c"] = value_log_decay.astype(wide)
    segments = None
    if segment_ids is not None:
        real = (segment_ids != 0)[:, :, None, None]
        rows = {name: jnp.where(real, x, 0) for name, x in rows.items()}
        segments = carried(segment_ids, jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment)

    c = min(CHUNK if chunk_size is None else chunk_size, t)
    if "g" in rows or "c" in rows:
        c = 1 << (c - 1).bit_length()  # decays are summed over halves of chunks
    n = -(-t // c)
    padded = n * c - t
    if padded:
        # Trailing zeros write nothing and decay nothing; their segment is the last one, so the final state is right.
        rows = {name: jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))) for name, x in rows.items()}
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded)), mode="edge")
    rows = {name: x.reshape(b, n, c, h, -1) for name, x in rows.items()}
    before = None
    if segments is not None:
        segments = segments.reshape(b, n, c)
        first = (
            initial_segment
            if initial_segment is not None and initial_state is not None
            else jnp.zeros(b, segments.dtype)
        )
        before = jnp.concatenate([first[:, None], segments[:, :-1, -1]], axis=1)
    state = jnp.zeros((b, h, key_dim, value_dim), wide) if initial_state is None else initial_state.astype(wide)
    reads = n > 1 or initial_state is not None
    carries = reads or return_state
    if n > 1 and device().platform == "cpu":
        # One chunk at a time, which stays in the processor's caches, and again in the backward pass: with all at once,
        # more than a third of the time goes into pages of fresh memory.
        def one(state, chunk):
            rows, segments, before = jax.tree.map(lambda x: x[:, None], chunk)
            o, state = _outputs(state, rows, segments, before, reads, carries, erase_before_decay, wide)
            return state, o[:, 0]

        chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (rows, segments, before))
        state, o = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), state, chunks)
        o = jnp.moveaxis(o, 0, 1)
    else:
        o, state = _outputs(state, rows, segments, before, reads, carries, erase_before_decay, wide)
    o = o.reshape(b, n * c, h, value_dim)[:, :t].astype(dtype)
    return o, state if return_state else None


def refuses(q, k, v, *, value_log_decay=None, erase_read=None, **_) -> str | None:
    """Why the chunked form cannot serve a call; None if it can."""
    if value_log_decay is not None and erase_read is not None:
        return "beside a decay of its columns (value_log_decay) a state is erased from (erase_read) one token at a time only"
    return None


def _outputs(state, rows, segments, before, reads, carries, erase_before_decay, wide):
    """Outputs (b, n, c, h, v) and the last state of chunks in order. before (b, n): the segment of the state before
    each chunk.
    reads, carries: whether there is a state before them, and whether the one after them matters."""
    rows = dict(rows)
    g, by_value = rows.pop("g", None), rows.pop("c", None)
    same = None if segments is None else (segments[:, :, :, None] == segments[:, :, None, :])[:, :, None]
    scores = decayed_products(rows["q"], rows["k"], g, same, wide)
    weights = _weights(g, segments, before) if carries or "e" in rows else (None, None, None)
    if by_value is not None:
        return _value_decayed(rows, scores, by_value, weights, state, wide)
    if "e" in rows:
        undecayed = erase_before_decay and g is not None
        early = _weights(before_decay(g), segments, before)[0] if undecayed else None
        return _erasing(rows, scores, g, same, weights, early, state, wide)
    o = _product(scores, rows["v"], wide)
    if carries:
        to_read, to_write, keeps = weights
        states, state = _states(state, _outer(_weighed(rows["k"], to_write, wide), rows["v"], wide), keeps)
        if reads:
            o = o + _read(_weighed(rows["q"], to_read, wide), states)
    return o, state


def _value_decayed(rows, scores, by_value, weights, state, wide):
    """Outputs (b, n, c, h, v) and last state where the state's columns decay and nothing is erased. by_value: (b, n,
    c, h, v)."""
    reads, writes, keeps = weights
    since = since_start(by_value)
    kept = jnp.exp(since[:, :, -1])[:, :, :, None]
    updates = _outer(_weighed(rows["k"], writes, wide), rows["v"] * jnp.exp(to_end(by_value)), wide)
    before, state = _states(state, updates, kept if keeps is None else keeps * kept)
    o = jnp.exp(since) * _read(_weighed(rows["q"], reads, wide), before)
    return o + decayed_sums(scores, rows["v"], by_value, wide), state


def _erasing(rows, scores, g, same, weights, early, state, wide):
    """Outputs (b, n, c, h, v) and last state where something is erased. early: weights of the erase's reads where it
    reads the undecayed state; None where it reads as q does."""
    reads, writes, keeps = weights
    products = decayed_products if early is None else products_before_decay
    strict = jnp.tril(jnp.ones((rows["q"].shape[2],) * 2, bool), -1)
    earlier = strict if same is None else same & strict
    u = rows.get("u", rows["k"])
    inverse = unit_inverse(products(rows["e"], u, g, earlier, wide))
    readers = _product(inverse, _weighed(rows["e"], reads if early is None else early, wide), wide)
    keys = _weighed(rows["k"], writes, wide)
    if "u" not in rows:
        # Of v - n, the part that does not depend on the state.
        own = _product(inverse, rows["v"].astype(wide), wide)
        apart = None
    else:
        # n alone, in own and readers' sign; v enters by itself.
        between = products(rows["e"], rows["k"], g, earlier, wide)
        own = -_product(inverse, _product(between, rows["v"].astype(wide), wide), wide)
        apart = (_outer(keys, rows["v"], wide), _product(scores, rows["v"].astype(wide), wide))
        keys = _weighed(u, writes, wide)

    def step(state, chunk):
        own, readers, keys, keep, update = chunk
        written = own - jnp.einsum("bihk,bhkv->bihv", readers, state)
        after = (state if keep is None else keep * state) + jnp.einsum("bihk,bihv->bhkv", keys, written)
        return after if update is None else after + update, (state, written)

    xs = (own, readers, keys, keeps, None if apart is None else apart[0])
    state, (before, written) = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    before, written = jnp.moveaxis(before, 0, 1), jnp.moveaxis(written, 0, 1)
    o = _read(_weighed(rows["q"], reads, wide), before)
    if apart is None:
        return o + _product(scores, written, wide), state
    return o + apart[1] + _product(decayed_products(rows["q"], u, g, same, wide), written, wide), state


def by_channel(x: jax.Array, wide) -> jax.Array:
    """A number per head (h,), per head and token (b, t, h), or per channel (b, t, h, d), as something that
    broadcasts over (b, t, h, d)."""
    return (x if x.ndim == 4 else x[..., None]).astype(wide)


def _product(matrix, x, wide):
    return jnp.moveaxis(jnp.einsum("bnhij,bnjhv->bnhiv", matrix.astype(x.dtype), x, preferred_element_type=wide), 2, 3)


def _outer(keys, values, wide):
    return jnp.einsum("bnjhk,bnjhv->bnhkv", keys, values.astype(wide), preferred_element_type=wide)


def _read(queries, states):
    return jnp.moveaxis(jnp.einsum("bnihk,bnhkv->bnhiv", queries, states, preferred_element_type=states.dtype), 2, 3)


def _weighed(x, weights, wide):
    if weights is None:
        return x.astype(wide)
    if weights.shape[-1] == 1:
        # Spread over channels by a product with ones, so that its gradient is one too: XLA's CPU backend takes ten
        # times as long for a sum over channels of products.
        weights = jnp.matmul(weights, jnp.ones((1, x.shape[-1]), weights.dtype), precision="highest")
    return x.astype(wide) * weights


def _weights(g, segments, before):
    """Per token the weight of its read of the state before the chunk and of its write to the chunk's end (b, n, c, h, k
    or 1), and per chunk the share of that state that is kept (b, n, h, k or 1, 1); None stands for ones."""
    writes = reads = keeps = None
    if g is not None:
        since = since_start(g)
        reads, writes, keeps = jnp.exp(since), jnp.exp(to_end(g)), jnp.exp(since[:, :, -1])[..., None]
    if segments is not None:
        last = segments[:, :, -1]
        same_end, same_start = segments == last[:, :, None], segments == before[:, :, None]
        one = jnp.ones((), jnp.float32) if g is None else 1
        writes = jnp.where(same_end[..., None, None], one if writes is None else writes, 0)
        reads = jnp.where(same_start[..., None, None], one if reads is None else reads, 0)
        keeps = jnp.where((last == before)[..., None, None, None], one if keeps is None else keeps, 0)
    return reads, writes, keeps


def _states(state, updates, keeps):
    """States before each chunk (b, n, h, k, v), and the one after the last."""
    if updates.shape[1] == 1:
        kept = state if keeps is None else keeps[:, 0] * state
        return state[:, None], kept + updates[:, 0]

    def step(state, chunk):
        update, keep = chunk
        kept = state if keep is None else keep * state
        return kept + update, state

    xs = (jnp.moveaxis(updates, 1, 0), None if keeps is None else jnp.moveaxis(keeps, 1, 0))
    state, before = jax.lax.scan(step, state, xs)
    return jnp.moveaxis(before, 0, 1), state
