"""The recurrence and all its gradients as walks (see walks.py): what the kernel backends share.

Nothing erased, with lambda_ij the decay from j to i and S, dS the state and its gradient,

    dq_i = sum_{j<=i} lambda_ij (do_i . v_j) k_j + lambda_i S do_i        the recurrence of (do, v, k)
    dk_j = sum_{i>=j} lambda_ij (v_j . do_i) q_i + ... dS v_j             that of (v, do, q), from the end
    dv_j = sum_{i>=j} lambda_ij (k_j . q_i) do_i + ... dS^T k_j           that of (k, q, do), from the end

so no state is stored for the way back. Every pair (i, j) grows with the log decay of the tokens after j up to i, hence

    dg_t = sum_{i>=t} (q_i . dq_i - k_i . dk_i)     (a channel at a time for a decay per channel).

That sum is taken within groups of tokens, at whose ends <S, dS> stands for the rest: over a long sequence the rounding
of products that cancel would outgrow it. The dots come from the walks in fp32. A decay per head rounds the same
products on both sides, so that groups can be long; one per channel does not.

With erasing (u = k), y_i = v_i - S'_i^T e_i is what is written in place of v_i. Its gradient x_i = dL/dv_i obeys the
same kind of recurrence from the end, in which q_i do_i^T is written and e_i x_i^T erased; then

    dv = x,    dq_i = S_i do_i,    de_i = -S'_i x_i,    dk_j = dS_j y_j

are again plain walks over y and x, and dg_t sums q_i . dq_i + e_i . de_i - k_i . dk_i. The inverse of (I + L) needs no
gradient. Walks that share operands, that for dq with that for de and the two for dk, run as one where a backend has
`Walks.joined`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total
from recollect.pallas_kernels.linear_recurrence.chunk_scan import (
    STRONGEST_CHANNEL_DECAY,
    Chunks,
    Decay,
    DeltaWalk,
    JoinedWalk,
    Solve,
    Solved,
    SolveTransposed,
    Walk,
    Walked,
)
from recollect.pallas_kernels.linear_recurrence.xla import by_channel, carried

GROUP = 1024
# At 1,000 tokens in bf16 the gradient of a decay per channel is off by 0.009 with groups of 64, 0.013 with 128, 0.018
# with 256 and 0.037 with 1024 (interpreted GPU kernels, 2026-11-23); a group costs two states' traffic.
CHANNEL_GROUP = 128


@dataclasses.dataclass(frozen=True)
class Walks:
    """A backend's walks and systems, and its choice of chunk: chunk_size(decay, erase, key_dim, value_dim, dtype) in
    tokens.

    joined: the walk that is two in one, which read less; None where there is none."""

    walk: Walk
    delta_walk: DeltaWalk
    solve: Solve
    solve_transposed: SolveTransposed
    chunk_size: Callable[[str, bool, int, int, Any], int]
    joined: JoinedWalk | None = None


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What does not vary with the values."""

    walks: Walks
    decay: str
    size: int
    scale: float
    returns_state: bool


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
    strength = None
    real = None if segment_ids is None else (segment_ids != 0)[:, :, None, None]
    if write_strength is not None:
        strength = by_channel(write_strength, jnp.float32)
        if real is not None:
            # Before the product: what padding holds, NaN included, must not reach a gradient either.
            strength, v = jnp.where(real, strength, 0), jnp.where(real, v, 0)
        if erase_read is None or strength.shape[-1] > 1:
            v, strength = (strength * v).astype(dtype), None
    decay = "none" if log_decay is None else "key" if log_decay.ndim == 4 else "head"
    rows = {"q": q.astype(dtype), "k": k.astype(dtype), "v": v}
    if decay != "none":
        g = log_decay.astype(jnp.float32)
        rows["g"] = g if decay == "key" else jnp.broadcast_to(g, (b, t, h))[..., None]
    if erase_read is not None:
        rows["e"] = erase_read.astype(dtype)
    if strength is not None:
        rows["strength"] = jnp.broadcast_to(strength, (b, t, h, 1))
    segments = first = None
    if real is not None:
        rows = {name: jnp.where(real, x, 0) for name, x in rows.items()}
        first = jnp.zeros(b, jnp.int32) if initial_segment is None else initial_segment
        segments = carried(segment_ids, first)
    c = chunk_size or walks.chunk_size(decay, erase_read is not None, key_dim, value_dim, dtype)
    padded = -t % c
    if padded:
        # Trailing zeros write nothing and decay nothing; their segment is the last one, so the final state is right.
        rows = {name: jnp.pad(x, ((0, 0), (0, padded), (0, 0), (0, 0))) for name, x in rows.items()}
        segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, padded)), mode="edge")
    state = None if initial_state is None else initial_state.astype(jnp.float32)
    o, state = _recurrence(_Setting(walks, decay, c, float(scale), return_state), rows, state, segments, first)
    o = o[:, :t]
    return o if real is None else jnp.where(real, o, 0), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(setting, rows, state, segments, first):
    return _run(setting, rows, state, segments, first, keeps=False)[0]


def _forwards(setting, rows, state, segments, first):
    return _run(setting, rows, state, segments, first, keeps=True)


def _run(setting, rows, state, segments, first, keeps):
    """Outputs and last state, and what is kept for the gradients."""
    chunks, solved = _chunks(setting, rows, segments, first), None
    if "e" not in rows:
        walked = setting.walks.walk(
            rows["q"], rows["k"], rows["v"], chunks, heads=rows["v"].shape[2], scale=setting.scale, initial_state=state
        )
    else:
        walked, solved = _erase_forwards(setting, rows, state, chunks, keeps)
    found = (walked.o, walked.state if setting.returns_state else None)
    return found, (rows, state, segments, first, walked.y, solved and (solved.inverse, solved.total), walked.state)


def _backwards(setting, kept, cotangents):
    rows, state, segments, first, y, solved, after = kept
    do, dstate = cotangents
    do = do.astype(rows["v"].dtype)
    chunks, inverse = _chunks(setting, rows, segments, first), None
    if solved is not None:
        inverse, total = solved
        chunks = chunks if total is None else dataclasses.replace(chunks, total=total)
    gradients, dstate = _gradients(setting, rows, state, chunks, y, inverse, after, do, dstate)
    return gradients, dstate, None, None


_recurrence.defvjp(_forwards, _backwards)


def _erase_forwards(setting, rows, state, chunks, keeps) -> tuple[Walked, Solved | None]:
    heads = rows["v"].shape[2]
    strength = rows["strength"][..., 0] if "strength" in rows else None
    decay = rows["g"] if setting.decay == "key" else None
    solved = setting.walks.solve(
        rows["e"], rows["k"], rows["v"], chunks, heads=heads, strength=strength, log_decay=decay, keeps=keeps
    )
    chunks = chunks if solved.total is None else dataclasses.replace(chunks, total=solved.total)
    walked = setting.walks.delta_walk(
        solved.w,
        solved.u,
        rows["k"],
        chunks,
        heads=heads,
        q=rows["q"],
        scale=setting.scale,
        initial_state=state,
        keeps_y=keeps,
    )
    return walked, solved if keeps else None


def _dual(setting, rows, chunks, inverse, do, dstate, every) -> Walked:
    """y is x; the walk's state is -dS, which is written -scale q do^T and e x^T."""
    heads, scale = rows["v"].shape[2], setting.scale
    solved = setting.walks.solve_transposed(inverse, rows["q"], rows["k"], do, chunks, heads=heads, scale=scale)
    return setting.walks.delta_walk(
        solved.w,
        solved.u,
        rows["e"],
        chunks,
        heads=heads,
        second=(rows["q"], do),
        scale=-scale,
        initial_state=None if dstate is None else -dstate,
        reverse=True,
        checkpoint_every=every,
    )


def _gradients(setting, rows, state, chunks, y, inverse, after, do, dstate):
    q, k, v = rows["q"], rows["k"], rows["v"]
    heads, scale, decay = v.shape[2], setting.scale, setting.decay
    every = None if decay == "none" else max(1, (CHANNEL_GROUP if decay == "key" else GROUP) // setting.size)
    turned = dataclasses.replace(chunks, decay="value" if decay == "key" else decay)
    # A decay per channel rounds q and k apart, so what a token has of itself would not cancel: it is left out of the
    # sums and added after.
    wide = {"out_dtype": jnp.float32, "strict": True} if decay == "key" else {}
    dots = (lambda x: {"dot_with": x}) if decay == "head" else (lambda x: {})
    walk = functools.partial(setting.walks.walk, heads=heads)
    written = v if y is None else y
    scaled = None if dstate is None else dstate.astype(jnp.float32) / scale
    joined = (
        functools.partial(setting.walks.joined, heads=heads)
        if y is not None and decay != "key" and setting.walks.joined
        else None
    )
    found: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    if y is None:
        back, of_state = (
            walk(k, q, do, chunks, scale=scale, initial_state=scaled, reverse=True, checkpoint_every=every),
            scale,
        )
        found["v"] = back.o
    else:
        e = rows["e"]
        back, of_state = _dual(setting, rows, chunks, inverse, do, dstate, every), -1.0
        x = back.y
        assert x is not None
        found["v"] = x
        if "strength" in rows:
            wide_x = x.astype(jnp.float32)
            found["v"] = rows["strength"] * wide_x
            found["strength"] = jnp.sum(wide_x * v.astype(jnp.float32), axis=-1, keepdims=True)
    if joined is not None:
        second = {"second_q": x, "second_scale": -1.0} | ({"second_dot_with": e} if decay == "head" else {})
        to_q = joined(
            do, written, k, turned, scale=scale, initial_state=_turn(state), checkpoint_every=every, **dots(q), **second
        )
        # Its state is -dS, as in `_dual`.
        start = None if dstate is None else -_turn(dstate)
        second = {"second": (do, q), "second_scale": -scale}
        to_k = joined(
            written, x, e, turned, scale=-1.0, initial_state=start, reverse=True, strict=True, **dots(k), **second
        )
        found |= {"e": to_q.second_o}
        dotted |= {"e": to_q.second_dots}
    else:
        to_q = walk(
            do, written, k, turned, scale=scale, initial_state=_turn(state), checkpoint_every=every, **dots(q), **wide
        )
        to_k = walk(written, do, q, turned, scale=scale, initial_state=_turn(scaled), reverse=True, **dots(k), **wide)
    found |= {"q": to_q.o, "k": to_k.o}
    dotted |= {"q": to_q.dots, "k": to_k.dots}
    if y is not None and joined is None:
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
    gradients = {name: gathered(x, rows[name]) for name, x in gradients.items()}
    if decay != "none":
        gradients["g"] = _decay_gradient(
            setting, rows, found, dotted, to_q.checkpoints, after, of_state * back.checkpoints, every, chunks
        )
    return gradients, None if state is None else of_state * back.state


def _decay_gradient(setting, rows, found, dotted, states, after, gradients, every, chunks):
    """dg (b, t, h, 1 or k), see the module; states are turned, (b, h, m, v, k), and gradients those of states, (b,
    h, m, k, v)."""
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
    at_ends = jnp.concatenate([_turn(states)[:, :, 1:], after[:, :, None]], axis=2)
    rest = jnp.sum(at_ends * gradients, axis=-1)  # (b, h, m, k)
    if total.shape[3] == 1:
        rest = jnp.sum(rest, axis=-1, keepdims=True)
    dg = sums_to_ends(total, rest, every * setting.size, chunks.segments)
    return jnp.where(rows["g"] < STRONGEST_CHANNEL_DECAY, 0, dg) if setting.decay == "key" else dg


def sums_to_ends(dots: jax.Array, rest: jax.Array, group: int, segments: jax.Array | None) -> jax.Array:
    """A decay's gradient (b, t, h, d): the sum of dots, likewise, from a token to its group's end, and the rest.

    Args:
      rest: (b, h, m, d), what later tokens have of the state at the end of each of m groups of `group` tokens, the last
        maybe of fewer.
      segments: (b, t), padding taking the segment before it; None is one document.
    """
    b, t, h, channels = dots.shape
    m = rest.shape[2]
    dots = jnp.pad(dots, ((0, 0), (0, m * group - t), (0, 0), (0, 0))).reshape(b, m, group, h, channels)
    found = jax.lax.cumsum(dots, axis=2, reverse=True) + jnp.moveaxis(rest, 1, 2)[:, :, None]
    found = found.reshape(b, m * group, h, channels)[:, :t]
    if segments is None:
        return found
    # A document's first token decays nothing; what the sum leaves there is rounding.
    first = jnp.concatenate([jnp.zeros((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jnp.where(first[:, :, None, None], 0, found)


def _chunks(setting, rows, segments, first) -> Chunks:
    b, t = rows["v"].shape[:2]
    c = setting.size
    total = None
    if setting.decay == "head":
        g = jnp.moveaxis(rows["g"][..., 0], 1, 2).reshape(b, -1, t // c, 1, c)
        # A masked sum is one launch; of a running sum XLA makes three.
        total = jnp.sum(jnp.where(jnp.tril(jnp.ones((c, c), bool)), g, 0), axis=-1).reshape(b, -1, t)
    elif setting.decay == "key" and "e" not in rows:  # else `solve` makes it
        total = running_total(rows["g"], c)
    return chunks_of(c, setting.decay, total, segments, first)


def chunks_of(c: int, decay: Decay, total, segments, first) -> Chunks:
    """Chunks of c tokens. segments: (b, t), padding taking the segment before it, or None; first: (b,) the one
    before the row."""
    if segments is None:
        return Chunks(c, decay, total)
    b, t = segments.shape
    chunked = segments.reshape(b, t // c, c)
    last = chunked[:, :, -1]
    before = jnp.concatenate([first[:, None].astype(last.dtype), last[:, :-1]], axis=1)
    starts = (chunked == before[:, :, None]).astype(jnp.float32).reshape(b, t)
    ends = (chunked == last[:, :, None]).astype(jnp.float32).reshape(b, t)
    return Chunks(c, decay, total, segments, starts, ends, (last == before).astype(jnp.float32))


def _turn(state):
    return None if state is None else jnp.swapaxes(state, -1, -2)


def gathered(gradient, like):
    """Summed over the heads that read the same head of `like`, in its dtype."""
    b, t, h, d = gradient.shape
    heads = like.shape[2]
    if heads != h:
        gradient = jnp.sum(gradient.astype(jnp.float32).reshape(b, t, heads, h // heads, d), axis=3)
    return gradient.astype(like.dtype)
