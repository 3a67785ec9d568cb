"""The recurrence in chunks of c tokens: a product with the filter inside of them, one state per mode between them.

With S^n the states before a chunk, and i, j = 0 ... c - 1 its tokens,

    o_i  = sum_{j<=i} f(i - j) (q_i . k_j) v_j + Re(sum_n residue_n exp((i + 1) log_pole_n) S^n)^T q_i
    S^n' = exp(c log_pole_n) S^n + sum_j exp((c - 1 - j) log_pole_n) k_j v_j^T

Powers of poles depend on places in a chunk alone: no state is formed per token. Chunks are computed one after the
other, and again in the backward pass. Complex states are held as their real, then their imaginary parts. In rows of
several documents valid tokens are moved to the front of their row and put back at the end, so that all lags count valid
tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.chunking import compaction, permuted, taken
from recollect.pallas_kernels.segments import carry_segments

CHUNK = 64


def modal_recurrence(
    q, k, v, log_poles, residues, state, *, segment_ids, first, return_state, chunk_size=None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the recurrence chunk by chunk; arguments as those of the reference."""
    b, t, h, value_dim = v.shape
    c = min(CHUNK if chunk_size is None else chunk_size, t)
    n = -(-t // c)
    log_poles = _wrapped(log_poles)
    reads, carries = n > 1 or state is not None, n > 1 or return_state
    if state is None:
        parts = 2 if jnp.iscomplexobj(log_poles) else 1
        key_dim = 1 if k is None else k.shape[3]
        state = jnp.zeros((b, h, parts * log_poles.shape[1], key_dim, value_dim), v.dtype)
    rows = {name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    place = order = None
    valid = jnp.ones((b, t), bool) if n * c > t else None
    if segment_ids is not None and first is not None:
        order, place = compaction(segment_ids)
        rows = {name: permuted(x, order, place) for name, x in rows.items()}
        in_front = taken(segment_ids, order)
        carried = carry_segments(in_front, first)
        rows |= {"segment": carried, "before": jnp.concatenate([first[:, None], carried[:, :-1]], axis=1)}
        valid = in_front != 0
    if return_state and valid is not None:  # the state after the last valid token, wherever in a chunk that is
        rows["valid"] = valid

    lags = jnp.arange(c)
    between = lags[:, None] - lags
    filter = jnp.where(between >= 0, _filter(log_poles, residues, jnp.maximum(between, 0)), 0)
    to_read, to_write = _read_weights(log_poles, residues, lags + 1), _powers(log_poles, c - 1 - lags)

    def one_chunk(state: jax.Array, chunk: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        o = _inside(chunk, filter)
        if reads:
            o = o + _from_before(chunk, to_read, state)
        return (_after(chunk, to_write, log_poles, state) if carries else state), o

    chunks = {name: _chunked(x, n, c) for name, x in rows.items()}
    if n == 1:
        state, o = one_chunk(state, {name: x[0] for name, x in chunks.items()})
    else:
        state, o = jax.lax.scan(jax.checkpoint(one_chunk, prevent_cse=False), state, chunks)
        o = jnp.moveaxis(o, 0, 1).reshape(b, n * c, h, value_dim)[:, :t]
    return o if order is None else permuted(o, place, order), state if return_state else None


def _chunked(x: jax.Array, n: int, c: int) -> jax.Array:
    """Returns chunks (n, b, c, ...) of x (b, t, ...). Tokens that are added at the end are of the last segment, and
    padding: zeros, False."""
    added = ((0, 0), (0, n * c - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, added, mode="edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant")
    return jnp.moveaxis(x.reshape(x.shape[0], n, c, *x.shape[2:]), 1, 0)


def _inside(chunk: dict[str, jax.Array], filter: jax.Array) -> jax.Array:
    """Outputs (b, c, h, v) by the tokens of the chunk itself; filter (h, i, j)."""
    v = chunk["v"]
    if "q" not in chunk and "segment" not in chunk:
        return jnp.einsum("hij,bjhv->bihv", filter, v)
    weights = filter[None]
    if "q" in chunk:
        weights = weights * jnp.einsum("bihk,bjhk->bhij", chunk["q"], chunk["k"])
    if "segment" in chunk:
        same = chunk["segment"][:, :, None] == chunk["segment"][:, None]
        weights = jnp.where(same[:, None], weights, 0)
    return jnp.einsum("bhij,bjhv->bihv", weights, v)


def _from_before(chunk: dict[str, jax.Array], to_read: jax.Array, state: jax.Array) -> jax.Array:
    """Outputs (b, c, h, v) by the state before the chunk."""
    states = jnp.einsum("ihm,bhmkv->bihkv", to_read, state)
    o = jnp.einsum("bihk,bihkv->bihv", chunk["q"], states) if "q" in chunk else states[:, :, :, 0]
    if "segment" in chunk:
        o = jnp.where((chunk["segment"] == chunk["before"][:, :1])[:, :, None, None], o, 0)
    return o


def _after(chunk: dict[str, jax.Array], to_write: jax.Array, log_poles: jax.Array, state: jax.Array) -> jax.Array:
    """The state after the chunk."""
    v, c, segment = chunk["v"], chunk["v"].shape[1], chunk.get("segment")
    written = chunk["k"][..., None] * v[..., None, :] if "k" in chunk else v[..., None, :]
    if segment is not None:
        written = jnp.where((segment == segment[:, -1:])[:, :, None, None, None], written, 0)
    if "valid" in chunk:
        count = jnp.sum(chunk["valid"], axis=1)
        weights = _powers(log_poles, jnp.maximum(count[:, None] - 1 - jnp.arange(c), 0))
        kept, update = _decayed(state, log_poles, count), jnp.einsum("bjhm,bjhkv->bhmkv", weights, written)
    else:
        kept, update = _decayed(state, log_poles, c), jnp.einsum("jhm,bjhkv->bhmkv", to_write, written)
    if segment is not None:
        kept = jnp.where((segment[:, -1] == chunk["before"][:, 0])[:, None, None, None, None], kept, 0)
    return kept + update


def _wrapped(log_poles: jax.Array) -> jax.Array:
    """Angles within half a turn: multiples of larger ones would round more."""
    if not jnp.iscomplexobj(log_poles):
        return log_poles
    angle = log_poles.imag
    return jax.lax.complex(log_poles.real, angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi)))


def _raised(log_poles: jax.Array, exponents: jax.Array) -> jax.Array:
    return jnp.exp(exponents[..., None, None] * log_poles)


def _powers(log_poles: jax.Array, exponents: jax.Array) -> jax.Array:
    """Poles to the power of exponents (*e), real and imaginary parts (*e, h, m)."""
    p = _raised(log_poles, exponents)
    return jnp.concatenate([p.real, p.imag], axis=-1) if jnp.iscomplexobj(p) else p


def _read_weights(log_poles: jax.Array, residues: jax.Array, exponents: jax.Array) -> jax.Array:
    """Weights (*e, h, m) by which the parts of a state sum to Re(sum_n residue_n pole_n^exponent S^n)."""
    w = residues * _raised(log_poles, exponents)
    return jnp.concatenate([w.real, -w.imag], axis=-1) if jnp.iscomplexobj(w) else w


def _filter(log_poles: jax.Array, residues: jax.Array, lags: jax.Array) -> jax.Array:
    """f (h, i, j) at lags (i, j)."""
    taps = jnp.sum(residues * _raised(log_poles, jnp.arange(lags.shape[0])), axis=-1).real
    return jnp.moveaxis(taps[lags], -1, 0)


def _decayed(state: jax.Array, log_poles: jax.Array, steps: int | jax.Array) -> jax.Array:
    """The state (b, h, m, k, v) after as many steps, one number or one per row, without inputs."""
    p = _raised(log_poles, jnp.asarray(steps))[..., None, None]
    if not jnp.iscomplexobj(p):
        return p * state
    real, imaginary = jnp.split(state, 2, axis=2)
    return jnp.concatenate([p.real * real - p.imag * imaginary, p.imag * real + p.real * imaginary], axis=2)
