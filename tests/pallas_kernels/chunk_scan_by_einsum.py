"""The walks of pallas_kernels/linear_recurrence/chunk_scan.py, chunk by chunk in plain jnp: what the kernels must
equal."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY, Chunks, ScanResult, Solution


def scan(
    q,
    k,
    v,
    chunks: Chunks,
    *,
    heads,
    scale=1.0,
    initial_state=None,
    reverse=False,
    strict=False,
    dot_with=None,
    checkpoint_every=None,
    out_dtype=None,
    second=None,
    second_q=None,
    second_dot_with=None,
    second_scale=1.0,
) -> ScanResult:
    """See chunk_scan.PairedScan. Walks are linear in what is written: the two of one are taken apart and summed."""

    def run(q, k, v, scale, initial_state, strict, dot_with):
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        return _scan(
            q, k, v, None, None, chunks, heads, scale, initial_state, reverse, strict, dot_with, checkpoint_every, dtype
        )

    found = run(q, k, v, scale, initial_state, strict, dot_with)
    if second is not None:
        other = run(q, *second, scale * second_scale, None, False, dot_with)
        sums = {
            name: getattr(found, name) + getattr(other, name)
            for name in ("o", "dots")
            if getattr(found, name) is not None
        }
        states = {name: getattr(found, name) + second_scale * getattr(other, name) for name in ("state",)}
        found = dataclasses.replace(found, **sums, **states)
    if second_q is not None:
        other = run(second_q, k, v, second_scale, initial_state, True, second_dot_with)
        found = dataclasses.replace(found, second_o=other.o.astype(out_dtype or v.dtype), second_dots=other.dots)
    return dataclasses.replace(found, o=found.o.astype(out_dtype or v.dtype))


def delta_scan(
    w,
    u,
    k,
    chunks: Chunks,
    *,
    heads,
    q=None,
    second=None,
    scale=1.0,
    initial_state=None,
    reverse=False,
    checkpoint_every=None,
    keeps_y=True,
) -> ScanResult:
    """See chunk_scan.DeltaScan."""
    result = _scan(
        q, k, u, w, second, chunks, heads, scale, initial_state, reverse, False, None, checkpoint_every, u.dtype
    )
    return result if keeps_y else dataclasses.replace(result, y=None)


def solve(e, k, v, chunks: Chunks, *, heads, strength=None, log_decay=None, keeps=True) -> Solution:
    """See chunk_scan.Solve."""
    w, u, inverses, total = [], [], [], None
    if log_decay is not None:
        g = jnp.maximum(log_decay, STRONGEST_CHANNEL_DECAY)
        total = jnp.cumsum(g.reshape(g.shape[0], -1, chunks.size, *g.shape[2:]), axis=2).reshape(g.shape)
        chunks = dataclasses.replace(chunks, total=total)
    e, k, v, strength = _by_head(heads, e, k, v, None if strength is None else strength[..., None])
    for here, pairs, reads, _ in _each_chunk(chunks, k):
        lower = jnp.einsum("bihk,bjhk,bijhk->bhij", e[:, here], k[:, here], pairs)
        inverse = jnp.linalg.inv(jnp.eye(chunks.size) + jnp.tril(lower, -1))
        written = v[:, here] if strength is None else strength[:, here] * v[:, here]
        w.append(jnp.einsum("bhij,bjhk->bihk", inverse, reads * e[:, here]))
        u.append(jnp.einsum("bhij,bjhv->bihv", inverse, written))
        inverses.append(inverse)
    return Solution(
        jnp.concatenate(w, axis=1), jnp.concatenate(u, axis=1), jnp.stack(inverses, axis=2) if keeps else None, total
    )


def solve_transposed(inverse, q, k, do, chunks: Chunks, *, heads, scale=1.0) -> Solution:
    """See chunk_scan.SolveTransposed; inverse as `solve` returns it."""
    w, u = [], []
    q, k, do = _by_head(heads, q, k, do)
    for at, (here, pairs, _, writes) in enumerate(_each_chunk(chunks, k)):
        turned = jnp.swapaxes(inverse[:, :, at].astype(k.dtype), -1, -2)
        scores = jnp.einsum("bihk,bjhk,bijhk->bhij", q[:, here], k[:, here], pairs)
        w.append(jnp.einsum("bhij,bjhk->bihk", turned, writes * k[:, here]))
        u.append(scale * jnp.einsum("bhij,bhlj,blhv->bihv", turned, scores, do[:, here]))
    return Solution(jnp.concatenate(w, axis=1), jnp.concatenate(u, axis=1))


def _by_head(heads, *arrays):
    return (_spread(x, heads, jnp.promote_types(x.dtype, jnp.float32)) if x is not None else None for x in arrays)


def _each_chunk(chunks, k):
    """Of each chunk: where it is, and weights forwards, of pairs (b, c, c, h, k), reads and writes (b, c, h, k | 1)."""
    b, t, h, key_dim = k.shape
    for at in range(t // chunks.size):
        here = slice(at * chunks.size, (at + 1) * chunks.size)
        pairs, _, reads, writes, _ = _weights(chunks, here, at, False, False, b, h, key_dim, 1, k.dtype)
        yield here, pairs, reads, writes


def _scan(
    q, k, v, w, second, chunks, heads, scale, initial_state, reverse, strict, dot_with, checkpoint_every, out_dtype
):
    wide = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v, w, dot_with = (_spread(x, heads, wide) for x in (q, k, v, w, dot_with))
    second = None if second is None else tuple(_spread(x, heads, wide) for x in second)
    b, t, _, value_dim = v.shape
    key_dim, c = k.shape[3], chunks.size
    n = t // c
    state = jnp.zeros((b, heads, key_dim, value_dim), wide) if initial_state is None else initial_state.astype(wide)
    o, y, dots, entered = [None] * n, [None] * n, [None] * n, {}
    for step in range(n):
        at = n - 1 - step if reverse else step
        if checkpoint_every is not None and step_enters(at, n, checkpoint_every, reverse):
            entered[at // checkpoint_every] = state
        here = slice(at * c, (at + 1) * c)
        key, value, reads, writes, keep = _weights(
            chunks, here, at, reverse, strict, b, heads, key_dim, value_dim, wide
        )
        written = v[:, here]
        if w is not None:
            written = written - jnp.einsum("bihk,bhkv->bihv", w[:, here], state)
            y[at] = written
        if q is not None:
            scores = jnp.einsum("bihk,bjhk,bijhk->bijh", q[:, here], k[:, here], key)
            out = jnp.einsum("bijh,bijhv,bjhv->bihv", scores, value, written)
            if chunks.decay == "value":
                out = out + reads * jnp.einsum("bihk,bhkv->bihv", q[:, here], state)
            else:
                out = out + jnp.einsum("bihk,bhkv->bihv", reads * q[:, here], state)
            o[at] = scale * out
            if dot_with is not None:
                dots[at] = jnp.moveaxis(jnp.sum(o[at] * dot_with[:, here], axis=-1), 1, 2)
        update = _outer(k[:, here], written, writes, chunks.decay)
        if second is not None:
            update = update + _outer(second[0][:, here], scale * second[1][:, here], writes, chunks.decay)
        state = keep * state + update
    return ScanResult(
        o=None if q is None else jnp.concatenate(o, axis=1).astype(out_dtype),
        state=state,
        dots=None if dot_with is None else jnp.concatenate(dots, axis=2),
        checkpoints=None if checkpoint_every is None else jnp.stack([entered[m] for m in sorted(entered)], axis=2),
        y=None if w is None else jnp.concatenate(y, axis=1).astype(out_dtype),
    )


def step_enters(at: int, n: int, every: int, reverse: bool) -> bool:
    """Whether the walk enters a group of `every` chunks at chunk `at` of n."""
    return at == n - 1 or at % every == every - 1 if reverse else at % every == 0


def _spread(x, heads, wide):
    return None if x is None else jnp.repeat(x.astype(wide), heads // x.shape[2], axis=2)


def _outer(k, v, writes, decay):
    if decay == "value":
        return jnp.einsum("bjhk,bjhv->bhkv", k, writes * v)
    return jnp.einsum("bjhk,bjhv->bhkv", writes * k, v)


def _weights(chunks, here, at, reverse, strict, b, h, key_dim, value_dim, wide):
    """Pair weights on keys' and on values' channels (b, c, c, h, k | v), reads and writes (b, c, h, k | v | 1), keep
    (b, h, k | 1, v | 1)."""
    c = chunks.size
    index = jnp.arange(c)
    later, earlier = index[:, None], index
    seen = (
        (later < earlier if strict else later <= earlier)
        if reverse
        else (later > earlier if strict else later >= earlier)
    )
    seen = jnp.broadcast_to(seen, (b, c, c))
    if chunks.total is None:
        total = jnp.zeros((b, c, h, 1), wide)
    elif chunks.decay == "head":
        total = jnp.moveaxis(chunks.total[:, :, here], 1, 2)[..., None].astype(wide)
    else:
        total = chunks.total[:, here].astype(wide)
    last = total[:, -1:]
    starts = ends = jnp.ones((b, c, 1, 1), wide)
    keeps = jnp.ones((b, 1, 1, 1), wide)
    if chunks.segments is not None:
        segments = chunks.segments[:, here]
        seen = seen & (segments[:, :, None] == segments[:, None, :])
        starts, ends = (x[:, here, None, None].astype(wide) for x in (chunks.starts, chunks.ends))
        keeps = chunks.keeps[:, at, None, None, None].astype(wide)
    difference = total[:, :, None] - total[:, None]
    pair = jnp.exp(jnp.where(seen[..., None, None], -difference if reverse else difference, -jnp.inf))
    to_start, to_end = jnp.exp(total) * starts, jnp.exp(last - total) * ends
    reads, writes = (to_end, to_start) if reverse else (to_start, to_end)
    keep = jnp.exp(last[:, 0])[:, :, :, None] * keeps
    if chunks.decay == "value":
        keep = jnp.swapaxes(keep, 2, 3)
        return (
            jnp.ones((b, c, c, h, key_dim), wide),
            jnp.broadcast_to(pair, (b, c, c, h, value_dim)),
            reads,
            writes,
            keep,
        )
    return jnp.broadcast_to(pair, (b, c, c, h, key_dim)), _mask_only(b, c, h, value_dim, wide), reads, writes, keep


def _mask_only(b, c, h, value_dim, wide):
    return jnp.ones((b, c, c, h, value_dim), wide)
