"""The recurrence and all its gradients as chunk scans (chunk_scan.py): what the kernel backends share.

Nothing erased, with lambda_ij the decay from j to i and S, dS the state and its gradient,

    dq_i = sum_{j<=i} lambda_ij (do_i . v_j) k_j + lambda_i S do_i        the recurrence of (do, v, k)
    dk_j = sum_{i>=j} lambda_ij (v_j . do_i) q_i + ... dS v_j             that of (v, do, q), in reverse
    dv_j = sum_{i>=j} lambda_ij (k_j . q_i) do_i + ... dS^T k_j           that of (k, q, do), in reverse

so no state is stored for the backward pass. Every pair (i, j) grows with the log decay of the tokens after j up to i,
hence

    dg_t = sum_{i>=t} (q_i . dq_i - k_i . dk_i)     (per channel for a decay per channel).

That sum is taken within groups of tokens, at whose ends <S, dS> stands for the rest: over a long sequence the rounding
of products that cancel would outgrow it. The dots come from the scans in fp32. A decay per head rounds the same
products on both sides, so that groups can be long; one per channel does not.

With erasing (u = k), y_i = v_i - S'_i^T e_i is what is written in place of v_i. Its gradient x_i = dL/dv_i obeys the
same kind of recurrence in reverse, in which q_i do_i^T is written and e_i x_i^T erased; then

    dv = x,    dq_i = S_i do_i,    de_i = -S'_i x_i,    dk_j = dS_j y_j

are again plain scans over y and x, and dg_t sums q_i . dq_i + e_i . de_i - k_i . dk_i. The inverse of (I + L) needs no
gradient. Scans that share operands, that for dq with that for de and the two for dk, run as one where a backend has
`ScanKernels.paired_scan`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_matrices import running_total
from recollect.pallas_kernels.linear_recurrence.chunk_scan import (
    STRONGEST_CHANNEL_DECAY,
    Chunks,
    Decay,
    ScanKernels,
    ScanResult,
    Solution,
)
from recollect.pallas_kernels.linear_recurrence.recurrence import (
    Recurrence,
    in_whole_chunks,
    repeat_heads,
    with_decay_per_token,
    with_strength,
    without_padding,
)
from recollect.pallas_kernels.segments import zero_padding

GROUP = 1024
# At 1,000 tokens in bf16 the gradient of a decay per channel is off by 0.009 with groups of 64, 0.013 with 128, 0.018
# with 256 and 0.037 with 1024 (interpreted GPU kernels, 2026-11-23); a group costs two states' traffic.
CHANNEL_GROUP = 128


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """What does not vary with the values: the backend, where the decay acts, c, and whether the state is returned."""

    kernels: ScanKernels
    decay: Decay
    size: int
    returns_state: bool


def recurrence_by_scans(
    kernels: ScanKernels, inputs: Recurrence, *, return_state: bool = False, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Computes `linear_recurrence` on a backend's kernels; columns do not decay, erase_write is None."""
    settings, prepared = prepare(kernels, inputs, return_state, chunk_size)
    o, state = _recurrence(settings, prepared)
    return zero_padding(o[:, : inputs.v.shape[1]], inputs.segment_ids), state


def prepare(
    kernels: ScanKernels, inputs: Recurrence, return_state: bool, chunk_size: int | None
) -> tuple[ScanSettings, Recurrence]:
    """Returns the inputs as scans take them: whole chunks without padding, rows in v's dtype, decays in fp32 per token.

    A write strength per head stays where something is erased (`Solve` takes it); otherwise it is in v.
    """
    dtype, decay, key_dim, value_dim = inputs.v.dtype, inputs.decay, inputs.q.shape[3], inputs.v.shape[3]
    erases, strength = inputs.erase_read is not None, inputs.write_strength
    size = chunk_size or kernels.chunk_size(decay, erases, key_dim, value_dim, dtype)
    inputs = with_decay_per_token(without_padding(inputs))
    if not erases or (strength is not None and strength.ndim == 4):
        inputs = with_strength(inputs)
    dtypes = {"q": dtype, "k": dtype, "erase_read": dtype} | dict.fromkeys(
        ("log_decay", "value_log_decay", "write_strength", "initial_state"), jnp.float32
    )
    present = {name: getattr(inputs, name) for name in dtypes}
    cast = {name: x.astype(dtypes[name]) for name, x in present.items() if x is not None}
    inputs = in_whole_chunks(dataclasses.replace(inputs, **cast), size)
    return ScanSettings(kernels, decay, size, return_state), inputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings: ScanSettings, inputs: Recurrence):
    return _run(settings, inputs, keep=False)[0]


def _forward(settings: ScanSettings, inputs: Recurrence):
    return _run(settings, inputs, keep=True)


def _run(settings: ScanSettings, inputs: Recurrence, keep: bool):
    """Outputs and last state, and what is kept for the gradients."""
    chunks, solution = _chunks(settings, inputs), None
    if inputs.erase_read is None:
        result = settings.kernels.scan(
            inputs.q,
            inputs.k,
            inputs.v,
            chunks,
            heads=inputs.v.shape[2],
            scale=inputs.scale,
            initial_state=inputs.initial_state,
        )
    else:
        result, solution = _erasing_scan(settings, inputs, chunks, keep)
    returned = (result.o, result.state if settings.returns_state else None)
    return returned, (inputs, result.y, solution and (solution.inverse, solution.total), result.state)


def _backward(settings, kept, cotangents):
    inputs, y, solution, after = kept
    do, d_state = cotangents
    chunks, inverse = _chunks(settings, inputs), None
    if solution is not None:
        inverse, total = solution
        chunks = chunks if total is None else dataclasses.replace(chunks, total=total)
    return (_gradients(settings, inputs, chunks, y, inverse, after, do.astype(inputs.v.dtype), d_state),)


_recurrence.defvjp(_forward, _backward)


def _erasing_scan(
    settings: ScanSettings, inputs: Recurrence, chunks: Chunks, keep: bool
) -> tuple[ScanResult, Solution | None]:
    heads = inputs.v.shape[2]
    solution = settings.kernels.solve(
        inputs.erase_read,
        inputs.k,
        inputs.v,
        chunks,
        heads=heads,
        strength=inputs.write_strength,
        log_decay=inputs.log_decay if settings.decay == "key" else None,
        keeps=keep,
    )
    chunks = chunks if solution.total is None else dataclasses.replace(chunks, total=solution.total)
    result = settings.kernels.delta_scan(
        solution.w,
        solution.u,
        inputs.k,
        chunks,
        heads=heads,
        q=inputs.q,
        scale=inputs.scale,
        initial_state=inputs.initial_state,
        keeps_y=keep,
    )
    return result, solution if keep else None


def _dual_scan(settings, inputs, chunks, inverse, do, d_state, every) -> ScanResult:
    """The scan whose y is x; its state is -dS, to which -scale q do^T and e x^T are written."""
    heads, scale = inputs.v.shape[2], inputs.scale
    solution = settings.kernels.solve_transposed(inverse, inputs.q, inputs.k, do, chunks, heads=heads, scale=scale)
    return settings.kernels.delta_scan(
        solution.w,
        solution.u,
        inputs.erase_read,
        chunks,
        heads=heads,
        second=(inputs.q, do),
        scale=-scale,
        initial_state=None if d_state is None else -d_state,
        reverse=True,
        checkpoint_every=every,
    )


def _gradients(settings, inputs, chunks, y, inverse, after, do, d_state):
    q, k, v, state = inputs.q, inputs.k, inputs.v, inputs.initial_state
    heads, scale, decay = v.shape[2], inputs.scale, settings.decay
    every = None if decay == "none" else max(1, (CHANNEL_GROUP if decay == "key" else GROUP) // settings.size)
    transposed = dataclasses.replace(chunks, decay="value" if decay == "key" else decay)
    # A decay per channel rounds q and k separately, so that the products of a token with itself would not cancel: they
    # are left out of the sums and added after.
    exact: dict[str, Any] = {"out_dtype": jnp.float32, "strict": True} if decay == "key" else {}
    dots = (lambda x: {"dot_with": x}) if decay == "head" else (lambda x: {})
    scan = functools.partial(settings.kernels.scan, heads=heads)
    paired_scan = settings.kernels.paired_scan if y is not None and decay != "key" else None
    written = v if y is None else y
    first = transpose(state)
    last = None if d_state is None else d_state.astype(jnp.float32) / scale
    gradients: dict[str, Any] = {}
    dotted: dict[str, Any] = {}
    if y is None:
        back = scan(k, q, do, chunks, scale=scale, initial_state=last, reverse=True, checkpoint_every=every)
        state_scale, gradients["v"] = scale, back.o
    else:
        e = inputs.erase_read
        back = _dual_scan(settings, inputs, chunks, inverse, do, d_state, every)
        state_scale, x = -1.0, back.y
        assert x is not None
        gradients["v"] = x
        if inputs.write_strength is not None:
            x_fp32 = x.astype(jnp.float32)
            gradients["v"] = inputs.write_strength[..., None] * x_fp32
            gradients["write_strength"] = jnp.sum(x_fp32 * v.astype(jnp.float32), axis=-1)
    to_q: dict[str, Any] = {"scale": scale, "initial_state": first, "checkpoint_every": every, **dots(q)}
    if paired_scan is not None:
        second = {"second_q": x, "second_scale": -1.0} | ({"second_dot_with": e} if decay == "head" else {})
        dq = functools.partial(paired_scan, heads=heads)(do, written, k, transposed, **to_q, **second)
        dk = paired_scan(
            written,
            x,
            e,
            transposed,
            heads=heads,
            scale=-1.0,
            initial_state=None if d_state is None else -transpose(d_state),  # -dS, as in `_dual_scan`
            reverse=True,
            strict=True,
            second=(do, q),
            second_scale=-scale,
            **dots(k),
        )
        gradients |= {"e": dq.second_o}
        dotted |= {"e": dq.second_dots}
    else:
        dq = scan(do, written, k, transposed, **to_q, **exact)
        dk = scan(
            written, do, q, transposed, scale=scale, initial_state=transpose(last), reverse=True, **dots(k), **exact
        )
    gradients |= {"q": dq.o, "k": dk.o}
    dotted |= {"q": dq.dots, "k": dk.dots}
    if y is not None and paired_scan is None:
        exact = exact | {"strict": True}
        erased = scan(y, x, e, transposed, scale=-1.0, reverse=True, **dots(k), **exact)
        de = scan(x, y, k, transposed, scale=-1.0, initial_state=first, **dots(e), **exact)
        gradients |= {"e": de.o, "k": gradients["k"].astype(jnp.float32) + erased.o.astype(jnp.float32)}
        if decay == "head":
            dotted |= {"e": de.dots, "k": dotted["k"] + erased.dots}
    log_decay = None
    if decay != "none":
        sums = _dots_per_token(settings, inputs, gradients, dotted)
        states = transpose(dq.checkpoints), state_scale * back.checkpoints
        log_decay = _decay_gradient(settings, inputs, sums, states, after, every, chunks)
    if decay == "key":
        diagonal = scale * jnp.sum(do.astype(jnp.float32) * written.astype(jnp.float32), axis=-1, keepdims=True)
        for name, x in (("q", k), ("k", q)):
            gradients[name] = gradients[name] + diagonal * repeat_heads(x, heads).astype(jnp.float32)
    fields = {"q": "q", "k": "k", "v": "v", "e": "erase_read"}
    summed = {
        field: sum_heads(gradients[name], getattr(inputs, field)) for name, field in fields.items() if name in gradients
    }
    return dataclasses.replace(
        inputs,
        **summed,
        log_decay=log_decay,
        write_strength=gradients.get("write_strength"),
        initial_state=None if state is None else state_scale * back.state,
        segment_ids=None,
        initial_segment=None,
    )


def _dots_per_token(settings, inputs: Recurrence, gradients, dotted) -> jax.Array:
    """q . dq + e . de - k . dk of every token, (b, t, h, 1), or per channel (b, t, h, k)."""
    if settings.decay == "head":
        total = dotted["q"] - dotted["k"] + dotted.get("e", 0)
        return jnp.moveaxis(total, 1, 2)[..., None]
    rows = {"q": inputs.q, "k": inputs.k, "e": inputs.erase_read}
    products = {
        name: repeat_heads(x, inputs.v.shape[2]).astype(jnp.float32) * gradients[name]
        for name, x in rows.items()
        if name in gradients
    }
    return products["q"] - products["k"] + products.get("e", 0)


def _decay_gradient(settings, inputs: Recurrence, dots, states, after, every, chunks) -> jax.Array:
    """dg, in log_decay's shape; see the module.

    Args:
      dots: `_dots_per_token`.
      states: the states with which groups of chunks begin and the gradients of those with which they end, each (b, h,
        m, k, v).
      after: (b, h, k, v), the last state.
    """
    starts, end_gradients = states
    ends = jnp.concatenate([starts[:, :, 1:], after[:, :, None]], axis=2)
    rest = jnp.sum(ends * end_gradients, axis=-1)  # (b, h, m, k)
    if dots.shape[3] == 1:
        rest = jnp.sum(rest, axis=-1, keepdims=True)
    dg = sums_to_ends(dots, rest, every * settings.size, chunks.segments)
    return jnp.where(inputs.log_decay < STRONGEST_CHANNEL_DECAY, 0, dg) if settings.decay == "key" else dg[..., 0]


def sums_to_ends(dots: jax.Array, rest: jax.Array, group: int, segments: jax.Array | None) -> jax.Array:
    """Returns a decay's gradient (b, t, h, d): the sum of dots, likewise, from a token to its group's end, and the rest.

    Args:
      rest: (b, h, m, d), what later tokens contribute by the state at the end of each of m groups of `group` tokens, of
        which the last may have fewer.
      segments: (b, t), padding taking the segment before it; None is one document.
    """
    b, t, h, channels = dots.shape
    m = rest.shape[2]
    dots = jnp.pad(dots, ((0, 0), (0, m * group - t), (0, 0), (0, 0))).reshape(b, m, group, h, channels)
    sums = jax.lax.cumsum(dots, axis=2, reverse=True) + jnp.moveaxis(rest, 1, 2)[:, :, None]
    sums = sums.reshape(b, m * group, h, channels)[:, :t]
    if segments is None:
        return sums
    # A document's first token decays nothing; what the sum leaves there is rounding.
    first = jnp.concatenate([jnp.zeros((b, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return jnp.where(first[:, :, None, None], 0, sums)


def _chunks(settings: ScanSettings, inputs: Recurrence) -> Chunks:
    c, total = settings.size, None
    if settings.decay == "head":
        b, t, h = inputs.log_decay.shape
        g = jnp.moveaxis(inputs.log_decay, 1, 2).reshape(b, h, t // c, 1, c)
        # A masked sum is one launch; of a running sum XLA makes three.
        total = jnp.sum(jnp.where(jnp.tril(jnp.ones((c, c), bool)), g, 0), axis=-1).reshape(b, h, t)
    elif settings.decay == "key" and inputs.erase_read is None:  # else `solve` makes it
        total = running_total(inputs.log_decay, c)
    return chunks_of(c, settings.decay, total, inputs.segment_ids, inputs.initial_segment)


def chunks_of(c: int, decay: Decay, total, segments, first) -> Chunks:
    """Returns chunks of c tokens; segments (b, t), padding taking the segment before it, or None; first (b,) the one
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


def transpose(state):
    """Returns states (..., k, v) as (..., v, k)."""
    return None if state is None else jnp.swapaxes(state, -1, -2)


def sum_heads(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the gradient summed over the heads that read the same head of `like`, in its dtype."""
    b, t, h, d = gradient.shape
    heads = like.shape[2]
    if heads != h:
        gradient = jnp.sum(gradient.astype(jnp.float32).reshape(b, t, heads, h // heads, d), axis=3)
    return gradient.astype(like.dtype)
