"""Taylor attention summed pair by pair in fp64, and the arguments and comparisons that its tests share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels import taylor_attention as operation
from recollect.pallas_kernels.taylor_attention.features import count
from tests.pallas_kernels.test_linear_recurrence import as_arrays

CLOSE = 1e-5  # fp32 sums of up to a thousand products, against fp64


def taylor_attention(*inputs, **settings):
    """The operation, of numpy's arrays too."""
    return operation(*as_arrays(inputs), **as_arrays(settings))


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found), initial=0))


def documents(b: int, t: int) -> np.ndarray:
    """Rows of documents of uneven length, with padding at the start, inside documents, between them and at the end."""
    rng = np.random.default_rng(t)
    rows = 3 + np.sort(rng.integers(0, 4, (b, t)), axis=1)
    if t > 8:
        rows[rng.random((b, t)) < 0.15] = 0
        rows[0, :3] = 0
        rows[-1, -5:] = 0
    return rows.astype(np.int32)


def arguments(t, with_state, with_segments, normalise=True, b=2, h=2, hk=2, k=5, v=4):
    """Random numpy inputs, those with gradients separately. The state is one that keys and values make: its normaliser
    is positive."""
    rng = np.random.default_rng(t)
    shapes = {"q": (b, t, hk, k), "k": (b, t, hk, k), "v": (b, t, h, v)}
    given: dict = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if with_state:
        keys, values = (
            rng.normal(size=(b, 9, h, k)).astype(np.float32),
            rng.normal(size=(b, 9, h, v)).astype(np.float32),
        )
        given["initial_state"] = by_loops(keys, keys, values, scale=1.0, normalise=normalise)[1].astype(np.float32)
    fixed: dict = {}
    if with_segments:
        fixed["segment_ids"] = documents(b, t)
        if with_state:
            first = [row[row != 0][0] for row in fixed["segment_ids"]]
            fixed["initial_segment"] = np.array(
                [first[0], *[2] * (b - 1)], np.int32
            )  # row 0 continues its document, others start one
    return given, fixed


def features(x):
    """phi of a vector in float64, written out."""
    k = len(x)
    pairs = [x[i] * x[j] * ((2 * k) ** -0.5 if i == j else k**-0.5) for i in range(k) for j in range(i, k)]
    return np.array([1, *(x * k**-0.25), *pairs])


def by_loops(
    q,
    k,
    v,
    *,
    scale=None,
    normalise=True,
    epsilon=1e-12,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
    return_state=True,
):
    """Outputs and last state in numpy float64: the weights of a document's pairs from the series, states from the
    features."""
    b, t, h, _ = v.shape
    size = q.shape[3]
    scale = size**-0.5 if scale is None else scale
    q, k = (np.repeat(np.asarray(x, np.float64), h // x.shape[2], axis=2) for x in (q, k))
    v = np.asarray(v, np.float64)
    o, states = np.zeros(v.shape), np.zeros((b, h, count(size), v.shape[3] + normalise))
    for row in range(b):
        for head in range(h):
            start = (
                np.zeros(states.shape[2:])
                if initial_state is None
                else np.asarray(initial_state[row, head], np.float64)
            )
            current, seen = (0 if initial_segment is None else int(initial_segment[row])), []
            for i in range(t):
                segment = 1 if segment_ids is None else int(segment_ids[row, i])
                if segment_ids is not None:
                    if segment == 0:
                        continue
                    if segment != current:
                        start, seen = np.zeros_like(start), []
                current = segment
                seen.append(i)
                s = scale * k[row, seen, head] @ q[row, i, head]
                weights = 1 + s + s**2 / 2
                values = v[row, seen, head]
                if normalise:
                    values = np.concatenate([values, np.ones((len(seen), 1))], axis=1)
                sums = weights @ values + features(q[row, i, head] * scale * size**0.5) @ start
                o[row, i, head] = sums[:-1] / (sums[-1] + epsilon) if normalise else sums
            for j in seen:
                value = np.append(v[row, j, head], 1) if normalise else v[row, j, head]
                start = start + np.outer(features(k[row, j, head]), value)
            states[row, head] = start
    return o, states


def results(run, given, fixed):
    """Outputs, state and the gradients by all float inputs of a sum that weighs every output and state element
    differently."""

    def loss(given):
        o, state = run(**given, **fixed)
        o_ = o.astype(jnp.promote_types(o.dtype, jnp.float32))
        total = jnp.sum(o_ * jnp.cos(jnp.arange(o.size, dtype=o_.dtype)).reshape(o.shape))
        if state is not None:
            total = total + 0.1 * jnp.sum(
                state * jnp.sin(1 + jnp.arange(state.size, dtype=state.dtype)).reshape(state.shape)
            )
        return total, (o, state)

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(given)
    return outputs, gradients


def exactly(run, given, fixed):
    """`results` of a specification in fp64."""
    with jax.enable_x64(True):
        given = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in given.items()}
        return jax.tree.map(np.asarray, results(run, given, fixed))


def compare(found, expected, close):
    """Outputs, state and every gradient, each within `close` of what is expected."""
    (o, state), gradients = found
    (o_, state_), gradients_ = expected
    assert error(o, o_) < close
    assert (state is None) == (state_ is None)
    if state is not None:
        assert state.dtype == jnp.float32 and error(state, state_) < close
    assert set(gradients) == set(gradients_)
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < close, (name, error(gradients[name], gradients_[name]))


def padding_is_inert(run, given, fixed):
    """Outputs, state and gradients are the same bits with NaN in padding as with zeros, and zero there."""
    real = fixed["segment_ids"] != 0

    def filled(value):
        return {
            name: x if name == "initial_state" else np.where(real[:, :, None, None], x, value)
            for name, x in given.items()
        }

    clean, dirty = (results(run, filled(np.float32(value)), fixed) for value in (0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.all(np.isfinite(dirty[0][1]))
    assert np.all(np.asarray(dirty[0][0])[~real] == 0)
    for name in ("q", "k", "v"):
        assert np.all(np.asarray(dirty[1][name])[~real] == 0), name


def cuts_are_joined(run, inputs, cuts, close):
    """A sequence in two calls, the state handed over, is one call."""
    given, fixed = inputs
    t, segments = given["q"].shape[1], fixed.get("segment_ids")
    whole, last = run(**given, **fixed)
    for cut in cuts:
        parts, state, first = [], given["initial_state"], fixed.get("initial_segment")
        for span in (slice(0, cut), slice(cut, t)):
            piece = {name: x[:, span] for name, x in given.items() if name != "initial_state"}
            more = {} if segments is None else {"segment_ids": segments[:, span], "initial_segment": first}
            o, state = run(**piece, initial_state=state, **more)
            parts.append(o)
            if segments is not None:
                first = np.array(
                    [([start] + [s for s in row[span] if s])[-1] for start, row in zip(first, segments, strict=True)],
                    np.int32,
                )
        assert error(np.concatenate(parts, axis=1), whole) < close and error(state, last) < close


def halved(given):
    return {name: x if name == "initial_state" else jnp.asarray(x, jnp.bfloat16) for name, x in given.items()}
