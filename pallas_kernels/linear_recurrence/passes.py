"""The recurrence and all its gradients as walks (see walks.py): what the kernel backends share.

Nothing erased, with lambda_ij the decay from j to i and S, dS the state and its gradient,

    dq_i = sum_{j<=i} lambda_ij (do_i . v_j) k_j + lambda_i S do_i        the recurrence of (do, v, k)
    dk_j = sum_{i>=j} lambda_ij (v_j . do_i) q_i + ... dS v_j             that of (v, do, q), from the end
    dv_j = sum_{i>=j} lambda_ij (k_j . q_i) do_i + ... dS^T k_j           that of (k, q, do), from the end

so no state is stored for the way back. Every pair (i, j) grows with the log decay of the tokens after j up to i, hence

    dg_t = sum_{i>=t} (q_i . dq_i - k_i . dk_i)     (a channel at a time for a decay a channel).

That sum is taken within groups of tokens, at whose ends <S, dS> stands for the rest: over a long sequence the rounding of products
that cancel would outgrow it. The dots come from the walks in fp32. A decay a head rounds the same products on both sides, so that
groups can be long; one a channel does not.

With erasing (u = k), y_i = v_i - S'_i^T e_i is what is written in place of v_i. Its gradient x_i = dL/dv_i obeys the same kind of
recurrence from the end, in which q_i do_i^T is written and e_i x_i^T erased; then

    dv = x,    dq_i = S_i do_i,    de_i = -S'_i x_i,    dk_j = dS_j y_j

are again plain walks over y and x, and dg_t sums q_i . dq_i + e_i . de_i - k_i . dk_i. The inverse of (I + L) needs no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence.triangles import decayed_products, since_start, to_end, unit_inverse_by_ladder
from pallas_kernels.linear_recurrence.walks import Chunks, DeltaWalk, Walk, Walked
from pallas_kernels.linear_recurrence.xla import by_channel, carried

GROUP = 1024
# At 1,000 tokens in bf16 the gradient of a decay a channel is off by 0.009 with groups of 64, 0.013 with 128, 0.018 with 256 and
# 0.037 with 1024 (interpreted GPU kernels, 2026-11-23); a group costs two states' traffic.
CHANNEL_GROUP = 128
# Kernels multiply by exp(g) of up to 8 tokens from either side of a reference: 8 x 10 is what fp32 holds. e^-10 is below what bf16 resolves.
STRONGEST_CHANNEL_DECAY = -10.0


@dataclasses.dataclass(frozen=True)
class Walks:
    """A backend's walks, and its choice of chunk: chunk_size(decay, erase, key_dim, value_dim, dtype) in tokens."""

    walk: Walk
    delta_walk: DeltaWalk
    chunk_size: Callable[[str, bool, int, int, Any], int]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What does not vary with the values."""

    walks: Walks
    decay: str
    size: int
    scale: float


def by_walks(
    walks: Walks,
    q,
    k,
    v,
    *,
    log_decay=None,
    write_strength=None,
    erase_read=None,
    erase_write=None,
    scale=1.0,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=False,
    chunk_size=None,
) -> tuple[jax.Array, jax.Array | None]:
    """The front door's call on a backend's walks; erase_write must be None."""
    b, t, h, value_dim = v.shape
    key_dim = q.shape[3]
    dtype = v.dtype
    if write_strength is not None:
        strength = by_channel(write_strength, jnp.float32)
        if segment_ids is not None:
            # Before the product: what padding holds, NaN included, must not reach a gradient either.
            real = (segment_ids != 0)[:, :, None, None]
            strength, v = jnp.where(real, strength, 0), jnp.where(real, v, 0)
        v = (strength * v).astype(dtype)
    decay = "none" if log_decay is None else "key" if log_decay.ndim == 4 else "head"
    rows = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v}
    if decay != "none":
        g = log_decay.astype(jnp.float32)
        rows["g"] = jnp.maximum(g, STRONGEST_CHANNEL_DECAY) if decay == "key" else jnp.broadcast_to(g, (b, t, h))[..., None]
    if erase_read is not None:
        rows["e"] = erase_read.astype(dtype)
    segments = None
    if segment_ids is not None:
        real = (segment_ids != 0)[:, :, None, None]
        rows = {name: jnp.where(real, x, 0) for name, x in rows.items()}
        segments = carried(segment_ids, jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment)
    c = chunk_size or walks.chunk_size(decay, erase_read is not None, key_dim, value_dim, dtype)
    padded = -t % c
    if padded:
        # Trailing zeros write nothing and decay nothing; their segment is the last one, so the final state is right.
        rows = {name: jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))) for name, x in rows.items()}
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded)), mode="edge")
    state = jnp.zeros((b, h, key_dim, value_dim), jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    first = None if segments is None else jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment
    o, state = _recurrence(_Setting(walks, decay, c, float(scale)), rows, state, segments, first)
    o = o[:, :t]
    if segment_ids is not None:
        o = jnp.where(real, o, 0)
    return o, state if return_state else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(setting, rows, state, segments, first):
    return _forwards(setting, rows, state, segments, first)[0]


def _forwards(setting, rows, state, segments, first):
    chunks = _chunks(setting, rows, segments, first)
    if "e" not in rows:
        walked = setting.walks.walk(
            rows["q"], rows["k"], rows["v"], chunks, heads=rows["v"].shape[2], scale=setting.scale, initial_state=state
        )
    else:
        walked = _erase_forwards(setting, rows, state, chunks)
    return (walked.o, walked.state), (rows, state, segments, first, walked.y, walked.state)


def _backwards(setting, kept, cotangents):
    rows, state, segments, first, y, after = kept
    do, dstate = cotangents
    do = do.astype(rows["v"].dtype)
    chunks = _chunks(setting, rows, segments, first)
    gradients, dstate = _gradients(setting, rows, state, chunks, y, after, do, dstate)
    return gradients, dstate, None, None


_recurrence.defvjp(_forwards, _backwards)


def _erase_forwards(setting, rows, state, chunks) -> Walked:
    e, k, v, g = (_in_chunks(rows.get(name), setting.size, rows["v"].shape[2]) for name in ("e", "k", "v", "g"))
    inverse = _inverse(e, k, g, chunks)
    w = _times(inverse, _weighed(e, g, chunks, to_start=True))
    u = _times(inverse, v)
    shape = rows["v"].shape
    return setting.walks.delta_walk(
        _flat(w, rows["e"]),
        _flat(u, rows["v"]),
        rows["k"],
        chunks,
        heads=shape[2],
        q=rows["q"],
        scale=setting.scale,
        initial_state=state,
    )


def _dual(setting, rows, chunks, do, dstate, every) -> Walked:
    """x / scale and the gradient of the initial state / scale."""
    h = rows["v"].shape[2]
    e, k, q, g, do_ = (_in_chunks(x, setting.size, h) for x in (rows["e"], rows["k"], rows["q"], rows.get("g"), do))
    transposed = jnp.swapaxes(_inverse(e, k, g, chunks), -1, -2)
    scores = decayed_products(q, k, g, _same(chunks), jnp.float32)
    u = _times(transposed, _times(jnp.swapaxes(scores, -1, -2), do_))
    w = -_times(transposed, _weighed(k, g, chunks, to_start=False))
    return setting.walks.delta_walk(
        _flat(w, rows["e"]),
        _flat(u, rows["v"]),
        -rows["e"],
        chunks,
        heads=h,
        second=(rows["q"], do),
        initial_state=dstate,
        reverse=True,
        checkpoint_every=every,
    )


def _gradients(setting, rows, state, chunks, y, after, do, dstate):
    q, k, v = rows["q"], rows["k"], rows["v"]
    heads, scale, decay = v.shape[2], setting.scale, setting.decay
    every = None if decay == "none" else max(1, (CHANNEL_GROUP if decay == "key" else GROUP) // setting.size)
    turned = dataclasses.replace(chunks, decay="value" if decay == "key" else decay)
    # A decay a channel rounds q and k apart, so what a token has of itself would not cancel: it is left out of the sums and added after.
    wide = {"out_dtype": jnp.float32, "strict": True} if decay == "key" else {}
    dots = (lambda x: {"dot_with": x}) if decay == "head" else (lambda x: {})
    walk = functools.partial(setting.walks.walk, heads=heads)
    written = v if y is None else y
    dstate = dstate.astype(jnp.float32) / scale
    to_q = walk(do, written, k, turned, scale=scale, initial_state=_turn(state), checkpoint_every=every, **dots(q), **wide)
    to_k = walk(written, do, q, turned, scale=scale, initial_state=_turn(dstate), reverse=True, **dots(k), **wide)
    found = {"q": to_q.o, "k": to_k.o}
    dotted = {"q": to_q.dots, "k": to_k.dots}
    if y is None:
        back = walk(k, q, do, chunks, scale=scale, initial_state=dstate, reverse=True, checkpoint_every=every)
        found["v"] = back.o
    else:
        e = rows["e"]
        back = _dual(setting, rows, chunks, do, dstate, every)
        assert back.y is not None
        x = (scale * back.y.astype(jnp.float32)).astype(v.dtype)
        found["v"] = x
        erased = walk(y, x, e, turned, scale=-1.0, reverse=True, **dots(k), **(wide | {"strict": True}))
        to_e = walk(x, y, k, turned, scale=-1.0, initial_state=_turn(state), **dots(e), **(wide | {"strict": True}))
        found |= {"e": to_e.o, "k": found["k"].astype(jnp.float32) + erased.o.astype(jnp.float32)}
        if decay == "head":
            dotted |= {"e": to_e.dots, "k": dotted["k"] + erased.dots}
    gradients = dict(found)
    if decay == "key":
        itself = scale * jnp.sum(do.astype(jnp.float32) * written.astype(jnp.float32), axis=-1, keepdims=True)
        gradients["q"] = found["q"] + itself * jnp.repeat(k, heads // k.shape[2], axis=2).astype(jnp.float32)
        gradients["k"] = found["k"] + itself * jnp.repeat(q, heads // q.shape[2], axis=2).astype(jnp.float32)
    gradients = {name: _gathered(x, rows[name]) for name, x in gradients.items()}
    if decay != "none":
        gradients["g"] = _decay_gradient(setting, rows, found, dotted, to_q.checkpoints, after, back, every, chunks)
    return gradients, scale * back.state


def _decay_gradient(setting, rows, found, dotted, states, after, back, every, chunks):
    """dg (b, t, h, 1 or k), see the module; states are turned, (b, h, m, v, k)."""
    if setting.decay == "head":
        total = dotted["q"] - dotted["k"] + dotted.get("e", 0)
        total = jnp.moveaxis(total, 1, 2)[..., None]
    else:
        h = rows["v"].shape[2]
        parts = {
            name: jnp.repeat(rows[name], h // rows[name].shape[2], axis=2).astype(jnp.float32) * found[name]
            for name in "qke"
            if name in found
        }
        total = parts["q"] - parts["k"] + parts.get("e", 0)
    b, t, h, channels = total.shape
    group = every * setting.size
    m = states.shape[2]
    total = jnp.pad(total, ((0, 0), (0, m * group - t), (0, 0), (0, 0))).reshape(b, m, group, h, channels)
    at_ends = jnp.concatenate([_turn(states)[:, :, 1:], after[:, :, None]], axis=2)
    rest = setting.scale * jnp.sum(at_ends * back.checkpoints, axis=-1)  # (b, h, m, k)
    if channels == 1:
        rest = jnp.sum(rest, axis=-1, keepdims=True)
    dg = jax.lax.cumsum(total, axis=2, reverse=True) + jnp.moveaxis(rest, 1, 2)[:, :, None]
    dg = dg.reshape(b, m * group, h, channels)[:, :t]
    if chunks.segments is not None:
        # A document's first token decays nothing; what the sum leaves there is rounding.
        first = jnp.concatenate([jnp.zeros((b, 1), bool), chunks.segments[:, 1:] != chunks.segments[:, :-1]], axis=1)
        dg = jnp.where(first[:, :, None, None], 0, dg)
    return dg


def _chunks(setting, rows, segments, first) -> Chunks:
    b, t = rows["v"].shape[:2]
    c = setting.size
    total = None
    if setting.decay != "none":
        total = since_start(rows["g"].reshape(b, t // c, c, *rows["g"].shape[2:])).reshape(rows["g"].shape)
        total = jnp.moveaxis(total[..., 0], 1, 2) if setting.decay == "head" else total
    if segments is None:
        return Chunks(c, setting.decay, total)
    chunked = segments.reshape(b, t // c, c)
    last = chunked[:, :, -1]
    before = jnp.concatenate([first[:, None].astype(last.dtype), last[:, :-1]], axis=1)
    starts = (chunked == before[:, :, None]).astype(jnp.float32).reshape(b, t)
    ends = (chunked == last[:, :, None]).astype(jnp.float32).reshape(b, t)
    return Chunks(c, setting.decay, total, segments, starts, ends, (last == before).astype(jnp.float32))


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


def _turn(state):
    return jnp.swapaxes(state, -1, -2)


def _gathered(gradient, like):
    """Summed over the heads that read the same head of `like`, in its dtype."""
    b, t, h, d = gradient.shape
    heads = like.shape[2]
    if heads != h:
        gradient = jnp.sum(gradient.astype(jnp.float32).reshape(b, t, heads, h // heads, d), axis=3)
    return gradient.astype(like.dtype)
