"""The selective scan: backends, on CPUs and elsewhere, against a loop in numpy; documents, states, gradients."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch, selective_scan
from tests.pallas_kernels.test_linear_scan import SEGMENTS, assert_close

B, T, F, N = 2, 13, 5, 3
FIRST = np.array([3, 7])
ON = {"cpu": contextlib.nullcontext, "gpu": functools.partial(dispatch.aimed_at, "gpu", "NVIDIA A100")}


def arrays(t=T):
    rng = np.random.default_rng(0)
    rows = {"u": rng.normal(size=(B, t, F)), "step": rng.uniform(0, 1, (B, t, F))}
    rows |= {name: rng.normal(size=(B, t, N)) for name in ("write", "read")}
    return rows | {"log_decay": -rng.uniform(0.1, 2, (F, N))}, rng.normal(size=(B, F, N))


def loop(x, state, segments=None, first=None):
    """Token by token, row by row; padding changes nothing and reads 0."""
    y, h = np.zeros_like(x["u"]), state.copy()
    for row in range(B):
        current = None if first is None else first[row]
        for t in range(y.shape[1]):
            if segments is not None:
                if segments[row, t] == 0:
                    continue
                if segments[row, t] != current:
                    h[row], current = 0, segments[row, t]
            step = x["step"][row, t][:, None]
            h[row] = np.exp(step * x["log_decay"]) * h[row] + step * np.outer(x["u"][row, t], x["write"][row, t])
            y[row, t] = h[row] @ x["read"][row, t]
    return y, h


def narrow(x):
    return {name: jnp.asarray(value, jnp.float32) for name, value in x.items()}


@pytest.mark.parametrize(
    ("backend", "chunk", "on"),
    [
        ("xla", 4, "cpu"),
        *(pytest.param(*case, marks=pytest.mark.more) for case in [("xla", 4, "gpu"), ("reference", None, "cpu")]),
    ],
)
def test_outputs_and_states_are_the_loops(backend, chunk, on):
    x, state = arrays()
    given = narrow(x)

    @jax.jit
    def run(**settings):
        return selective_scan(**given, backend=backend, chunk_size=chunk, return_state=True, **settings)

    past = {"initial_state": jnp.asarray(state, jnp.float32)}
    packed = {"segment_ids": jnp.asarray(SEGMENTS), "initial_segment": jnp.asarray(FIRST)}
    for settings, expected in (
        ({}, loop(x, 0 * state)),
        (past, loop(x, state)),
        (past | packed, loop(x, state, SEGMENTS, FIRST)),
    ):
        with ON[on]():
            results = run(**settings)
        for result, wanted in zip(results, expected, strict=True):
            assert_close(result, wanted)


@pytest.mark.more
@pytest.mark.parametrize("on", ON)
def test_gradients_are_the_references_and_padding_may_hold_anything(on):
    x, state = arrays(40)
    given, state = narrow(x), jnp.asarray(state, jnp.float32)
    segments = jnp.asarray(np.repeat(SEGMENTS, 4, axis=1)[:, :40])

    def loss(backend, given, state):
        settings = {"segment_ids": segments, "initial_state": state, "initial_segment": jnp.asarray(FIRST)}
        y, last = selective_scan(**given, backend=backend, return_state=True, **settings)
        return jnp.sum(jnp.sin(y)) + jnp.sum(last**2)

    def poison(value):
        return value if value.ndim == 2 else jnp.where((segments != 0)[..., None], value, jnp.nan)

    xla, reference = (jax.jit(jax.grad(functools.partial(loss, name), (0, 1))) for name in ("xla", "reference"))
    with ON[on]():
        clean, poisoned = xla(given, state), xla({name: poison(value) for name, value in given.items()}, state)
    for result, wanted in zip(jax.tree.leaves(clean), jax.tree.leaves(reference(given, state)), strict=True):
        assert_close(result, np.asarray(wanted), 1e-5)
        assert np.abs(np.asarray(wanted)).max() > 0.01
    for result, wanted in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": jnp.zeros((2, 3))}, r"u must be \(b, t, f\)"),
        ({"log_decay": jnp.zeros((4, 3))}, r"log_decay must be \(5, n\); got \(4, 3\)"),
        ({"write": jnp.zeros((2, 13, 4))}, r"write must be \(2, 13, 3\); got \(2, 13, 4\)"),
        ({"initial_state": jnp.zeros((2, 3, 5))}, r"initial_state must be \(2, 5, 3\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"segment_ids": SEGMENTS, "initial_state": jnp.zeros((2, 5, 3))}, "needs initial_segment"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(selective_scan)(**(narrow(arrays()[0]) | changes))  # before tests' checks of shapes
