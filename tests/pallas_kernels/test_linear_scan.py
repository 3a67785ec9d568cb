"""The elementwise scan: both backends against a loop in numpy; documents, padding, states, steps, gradients."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import linear_scan
from recollect.pallas_kernels.dispatch import recorded_choices

B, F = 2, 5
SEGMENTS = np.array([[0, 3, 3, 0, 3, 1, 1, 0, 0, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 4, 4, 4, 4, 4, 0, 0]])


def arrays(t=13, kind=float, seed=0):
    rng = np.random.default_rng(seed)
    a, b, state = rng.uniform(-1, 1, (B, t, F)), rng.normal(size=(B, t, F)), rng.normal(size=(B, F))
    if kind is complex:
        a, b, state = a * np.exp(1j * rng.normal(size=a.shape)), b + 1j * rng.normal(size=b.shape), state * (1 + 2j)
    return a, b, state


def loop(a, b, state, segments=None, first=None):
    """Token by token, row by row; padding changes nothing and reads 0."""
    h, state = np.zeros_like(b), state.copy()
    for row in range(len(a)):
        current = None if first is None else first[row]
        for t in range(a.shape[1]):
            if segments is not None:
                if segments[row, t] == 0:
                    continue
                if segments[row, t] != current:
                    state[row], current = 0, segments[row, t]
            state[row] = a[row, t] * state[row] + b[row, t]
            h[row, t] = state[row]
    return h, state


def assert_close(result, expected, size=3e-6):
    assert np.abs(np.asarray(result) - expected).max() < size * max(1, np.abs(expected).max())


def narrow(x):
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize(("backend", "chunk"), [("xla", 1), ("xla", 4), ("xla", None), ("reference", None)])
def test_states_are_the_loops(backend, chunk, kind):
    a, b, state = arrays(kind=kind)
    run = functools.partial(linear_scan, narrow(a), narrow(b), backend=backend, chunk_size=chunk, return_state=True)
    for result, expected in zip(run(), loop(a, b, 0 * state), strict=True):
        assert_close(result, expected)
    for result, expected in zip(run(initial_state=narrow(state)), loop(a, b, state), strict=True):
        assert_close(result, expected)
    first, segments = np.array([3, 7]), jnp.asarray(SEGMENTS)
    settings = {"initial_state": narrow(state), "segment_ids": segments, "initial_segment": jnp.asarray(first)}
    for result, expected in zip(run(**settings), loop(a, b, state, SEGMENTS, first), strict=True):
        assert_close(result, expected)
    assert_close(run(segment_ids=segments)[0], loop(a, b, 0 * state, SEGMENTS)[0])


@pytest.mark.parametrize("kind", [float, complex])
def test_gradients_are_the_references(kind):
    a, b, state = (narrow(x) for x in arrays(200, kind))
    segments = jnp.asarray(np.repeat(SEGMENTS, 16, axis=1)[:, :200])

    def loss(backend, a, b, state):
        settings = {"segment_ids": segments, "initial_state": state, "initial_segment": jnp.asarray([3, 5])}
        h, last = linear_scan(a, b, backend=backend, return_state=True, **settings)
        return jnp.sum(jnp.sin(jnp.real(h)) + jnp.cos(jnp.imag(h))) + jnp.sum(jnp.abs(last) ** 2)

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, backend), (0, 1, 2)))(a, b, state) for backend in ("xla", "reference")
    ]
    for result, expected in zip(*gradients, strict=True):
        assert_close(result, np.asarray(expected), 1e-5)
        assert np.abs(np.asarray(expected)).max() > 0.01


def test_padding_may_hold_anything():
    a, b, _ = (narrow(x) for x in arrays())
    segments = jnp.asarray(SEGMENTS)
    poisoned = [jnp.where((segments != 0)[..., None], x, jnp.nan) for x in (a, b)]

    def loss(a, b):
        return jnp.sum(jnp.sin(linear_scan(a, b, segment_ids=segments)[0]))

    for clean, poison in zip(jax.grad(loss, (0, 1))(a, b), jax.grad(loss, (0, 1))(*poisoned), strict=True):
        np.testing.assert_array_equal(clean, poison)


def test_one_token_with_a_state_is_a_step():
    a, b, state = (narrow(x) for x in arrays(1))
    with recorded_choices() as choices:
        h, last = linear_scan(a, b, initial_state=state, return_state=True)
    assert choices == []
    assert_close(h[:, 0], np.asarray(a[:, 0] * state + b[:, 0]))
    np.testing.assert_array_equal(h[:, 0], last)


def test_half_precision_is_summed_in_fp32():
    a, b, _ = arrays(500)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
    h, _ = linear_scan(*low)
    assert h.dtype == jnp.float32
    assert_close(h, loop(*(np.asarray(x, np.float64) for x in low), np.zeros((B, F)))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": jnp.zeros((2, 3))}, r"a must be \(b, t, f\)"),
        ({"b": jnp.zeros((2, 13, 4))}, r"b must be \(2, 13, 5\); got \(2, 13, 4\)"),
        ({"initial_state": jnp.zeros((2, 4))}, r"initial_state must be \(2, 5\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"segment_ids": SEGMENTS, "initial_state": jnp.zeros((2, 5))}, "needs initial_segment"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    a, b, _ = (narrow(x) for x in arrays())
    changes = {name: jnp.asarray(x) if name == "segment_ids" else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linear_scan)(**({"a": a, "b": b} | changes))  # before tests' checks of shapes
