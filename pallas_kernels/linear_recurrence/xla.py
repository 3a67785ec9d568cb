"""The recurrence in chunks: masked products inside chunks of c tokens, one state per chunk between them; memory linear
in length.

On CPUs chunks are computed one after the other, elsewhere all at once except for their states.

With G the running sum of log decay inside a chunk, S the state before it, and nothing erased,

    o_i = exp(G_i) q_i S + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j,
    S'  = exp(G_c) S + sum_j exp(G_c - G_j) k_j v_j^T.

What is erased, n_i = S'_i^T e_i, obeys a triangular system inside the chunk (the WY form of Yang et al. 2024,
"Parallelizing linear transformers with the delta rule", with different e and u):

    (I + L_eu) n = exp(G) e S + L_ek v,      (L_xy)_ij = x_i . exp(G_i - G_j) y_j  for j < i, else 0,

and -n^T is written with u as v^T is with k. For u = k this is one write, of v - n = (I + L)^-1 (v - exp(G) e S).

Exponents are at most 0 when decays are: exp(-G_j) is never formed alone. Documents inside a chunk: a pair needs equal
segments, the state is read by tokens of its own segment only, and only the last segment's tokens enter the next state.

Where the erase reads the undecayed state, exp(G_i) becomes exp(G_{i-1}) in the system. A decay C of the state's columns
multiplies v_j by exp(C_i - C_j), channel by channel; with erasing, each column would have a system of its own, which is
refused.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.dispatch import device
from recollect.pallas_kernels.linear_recurrence.chunk_matrices import (
    before_decay,
    decayed_products,
    decayed_sums,
    of_token_before,
    since_start,
    to_end,
    token_after,
    unit_inverse,
)
from recollect.pallas_kernels.linear_recurrence.documents import recurrence_by_documents
from recollect.pallas_kernels.linear_recurrence.recurrence import (
    Recurrence,
    by_channel,
    in_whole_chunks,
    repeat_heads,
    with_strength,
    without_padding,
)

CHUNK = 64


def linear_recurrence(
    inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the recurrence chunk by chunk; see `linear_recurrence`."""
    b, t, h, value_dim = inputs.v.shape
    if inputs.by_document:
        size = min(CHUNK if chunk_size is None else chunk_size, t)
        return recurrence_by_documents(linear_recurrence, inputs, return_state=return_state, chunk_size=size)
    out_dtype, dtype = inputs.v.dtype, jnp.promote_types(inputs.q.dtype, jnp.float32)
    c = min(CHUNK if chunk_size is None else chunk_size, t)
    if inputs.decay != "none":
        c = 1 << (c - 1).bit_length()  # decays are summed over halves of chunks
    n = -(-t // c)
    inputs = in_whole_chunks(with_strength(without_padding(inputs)), c)
    rows = _chunks(inputs, c, dtype)
    segments = before = None
    if inputs.segment_ids is not None:
        segments = inputs.segment_ids.reshape(b, n, c)
        before = jnp.concatenate([inputs.initial_segment[:, None], segments[:, :-1, -1]], axis=1)
    state = inputs.initial_state
    reads = n > 1 or state is not None
    carries = reads or return_state
    state = jnp.zeros((b, h, inputs.q.shape[3], value_dim), dtype) if state is None else state.astype(dtype)
    settings = (reads, carries, inputs.erase_before_decay, dtype)
    if n > 1 and device().platform == "cpu":
        # One chunk at a time, which stays in the processor's caches, and again in the backward pass: with all at once,
        # more than a third of the time goes into pages of fresh memory.
        def one_chunk(state, chunk):
            rows, segments, before = jax.tree.map(lambda x: x[:, None], chunk)
            o, state = _outputs(state, rows, segments, before, *settings)
            return state, o[:, 0]

        chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (rows, segments, before))
        state, o = jax.lax.scan(jax.checkpoint(one_chunk, prevent_cse=False), state, chunks)
        o = jnp.moveaxis(o, 0, 1)
    else:
        o, state = _outputs(state, rows, segments, before, *settings)
    o = o.reshape(b, n * c, h, value_dim)[:, :t].astype(out_dtype)
    return o, state if return_state else None


def _chunks(inputs: Recurrence, c: int, dtype: Any) -> dict[str, jax.Array]:
    """The inputs q, k, v, e, u and log decays g and c that there are, (b, n, c, h, channels or 1), all with v's
    heads."""
    b, _, h, _ = inputs.v.shape
    q = inputs.q * jnp.asarray(inputs.scale, inputs.q.dtype)
    rows = {"q": q, "k": inputs.k, "v": inputs.v, "e": inputs.erase_read, "u": inputs.erase_write}
    if inputs.log_decay is not None:
        g = by_channel(inputs.log_decay, dtype)
        rows["g"] = jnp.broadcast_to(g, (*inputs.v.shape[:3], g.shape[-1]))
    if inputs.value_log_decay is not None:
        rows["c"] = inputs.value_log_decay.astype(dtype)
    return {name: repeat_heads(x, h).reshape(b, -1, c, h, x.shape[-1]) for name, x in rows.items() if x is not None}


def refuses(inputs: Recurrence, **_) -> str | None:
    """Returns why this backend cannot serve a call, None if it can."""
    if inputs.value_log_decay is not None and inputs.erase_read is not None:
        return "where the state's columns decay (value_log_decay) it does not erase (erase_read); the reference does"
    return None


def _outputs(state, rows, segments, before, reads, carries, erase_before_decay, dtype):
    """Outputs (b, n, c, h, v) and the last state of chunks in order.

    before: (b, n), the segment of the state before each chunk. reads, carries: whether there is a state before them,
    and whether the one after them matters.
    """
    rows = dict(rows)
    g, c = rows.pop("g", None), rows.pop("c", None)
    same = None if segments is None else (segments[:, :, :, None] == segments[:, :, None, :])[:, :, None]
    weights = _weights(g, segments, before) if carries or "e" in rows else (None, None, None)
    if "e" in rows:
        undecayed = erase_before_decay and g is not None
        erase_reads = _weights(before_decay(g), segments, before)[0] if undecayed else None
        return _erasing(rows, g, same, weights, erase_reads, state, dtype)
    ((scores,),) = decayed_products([rows["q"]], [rows["k"]], g, [same], dtype)
    if c is not None:
        return _value_decayed(rows, scores, c, weights, state, dtype)
    o = _product(scores, rows["v"], dtype)
    if carries:
        to_read, to_write, keeps = weights
        states, state = _states(state, _outer(_weighted(rows["k"], to_write, dtype), rows["v"], dtype), keeps)
        if reads:
            o = o + _read(_weighted(rows["q"], to_read, dtype), states)
    return o, state


def _value_decayed(rows, scores, c, weights, state, dtype):
    """Outputs (b, n, c, h, v) and last state where the state's columns decay, by c (b, n, c, h, v), and nothing is
    erased."""
    reads, writes, keeps = weights
    since = since_start(c)
    decayed = jnp.exp(since[:, :, -1])[:, :, :, None]
    updates = _outer(_weighted(rows["k"], writes, dtype), rows["v"] * jnp.exp(to_end(c)), dtype)
    before, state = _states(state, updates, decayed if keeps is None else keeps * decayed)
    o = jnp.exp(since) * _read(_weighted(rows["q"], reads, dtype), before)
    return o + decayed_sums(scores, rows["v"], c, dtype), state


def _erasing(rows, g, same, weights, erase_reads, state, dtype):
    """Outputs (b, n, c, h, v) and last state where something is erased.

    erase_reads: weights of the erase's reads where it reads the undecayed state; None where it reads as q does.
    """
    reads, writes, keeps = weights
    strict = jnp.tril(jnp.ones((rows["q"].shape[2],) * 2, bool), -1)
    earlier = strict if same is None else same & strict
    readers, kept = (rows["e"], earlier) if erase_reads is None else (token_after(rows["e"]), None)
    columns = [rows[name] for name in ("k", "u") if name in rows]
    scores, erased = decayed_products([rows["q"], readers], columns, g, [same, kept], dtype)
    if erase_reads is not None:
        erased = [of_token_before(products, earlier) for products in erased]
    inverse = unit_inverse(erased[-1])
    readers = _product(inverse, _weighted(rows["e"], reads if erase_reads is None else erase_reads, dtype), dtype)
    keys = _weighted(rows["k"], writes, dtype)
    if "u" not in rows:
        # Of v - n, the part that does not depend on the state.
        independent = _product(inverse, rows["v"].astype(dtype), dtype)
        write_terms = None
    else:
        # n alone, with the sign of v - n; v is written by terms of its own.
        independent = -_product(inverse, _product(erased[0], rows["v"].astype(dtype), dtype), dtype)
        write_terms = (_outer(keys, rows["v"], dtype), _product(scores[0], rows["v"].astype(dtype), dtype))
        keys = _weighted(rows["u"], writes, dtype)

    def step(state, chunk):
        independent, readers, keys, keep, update = chunk
        written = independent - jnp.einsum("bihk,bhkv->bihv", readers, state)
        after = (state if keep is None else keep * state) + jnp.einsum("bihk,bihv->bhkv", keys, written)
        return after if update is None else after + update, (state, written)

    xs = (independent, readers, keys, keeps, None if write_terms is None else write_terms[0])
    state, (before, written) = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    before, written = jnp.moveaxis(before, 0, 1), jnp.moveaxis(written, 0, 1)
    o = _read(_weighted(rows["q"], reads, dtype), before)
    if write_terms is not None:
        o = o + write_terms[1]
    return o + _product(scores[-1], written, dtype), state


def _product(matrix, x, dtype):
    return jnp.moveaxis(jnp.einsum("bnhij,bnjhv->bnhiv", matrix.astype(x.dtype), x, preferred_element_type=dtype), 2, 3)


def _outer(keys, values, dtype):
    return jnp.einsum("bnjhk,bnjhv->bnhkv", keys, values.astype(dtype), preferred_element_type=dtype)


def _read(queries, states):
    return jnp.moveaxis(jnp.einsum("bnihk,bnhkv->bnhiv", queries, states, preferred_element_type=states.dtype), 2, 3)


def _weighted(x, weights, dtype):
    if weights is None:
        return x.astype(dtype)
    if weights.shape[-1] == 1:
        # Spread over channels by a product with ones, so that its gradient is one too: XLA's CPU backend takes ten
        # times as long for a sum over channels of products.
        weights = jnp.matmul(weights, jnp.ones((1, x.shape[-1]), weights.dtype), precision="highest")
    return x.astype(dtype) * weights


def _weights(g, segments, before):
    """Per token the weight of its read of the state before the chunk and of its write to the chunk's end (b, n, c, h, k
    or 1), and per chunk the share of that state that is decayed (b, n, h, k or 1, 1); None stands for ones."""
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
        decayed = state if keeps is None else keeps[:, 0] * state
        return state[:, None], decayed + updates[:, 0]

    def step(state, chunk):
        update, keep = chunk
        decayed = state if keep is None else keep * state
        return decayed + update, state

    xs = (jnp.moveaxis(updates, 1, 0), None if keeps is None else jnp.moveaxis(keeps, 1, 0))
    state, before = jax.lax.scan(step, state, xs)
    return jnp.moveaxis(before, 0, 1), state
