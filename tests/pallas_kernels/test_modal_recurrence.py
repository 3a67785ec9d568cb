"""The recurrence with constant modes: both backends against a loop in numpy; documents, padding, states, gradients."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import modal_recurrence
from recollect.pallas_kernels.dispatch import recorded_choices
from tests.pallas_kernels.test_linear_scan import SEGMENTS, assert_close

B, H, N, K, V = 2, 3, 4, 2, 5
FIRST = np.array([3, 7])


def arrays(kind=complex, keys=True, t=13):
    rng = np.random.default_rng(0)
    poles = rng.uniform(0.3, 0.99, (H, N)) * (np.exp(2j * rng.normal(size=(H, N))) if kind is complex else 1)
    residues = rng.normal(size=(H, N)) + (1j * rng.normal(size=(H, N)) if kind is complex else 0)
    q, k = rng.normal(size=(2, B, t, H, K)) if keys else (None, None)
    state = rng.normal(size=(B, H, N * (2 if kind is complex else 1), K if keys else 1, V))
    return {"v": rng.normal(size=(B, t, H, V)), "log_poles": np.log(poles), "residues": residues, "q": q, "k": k}, state


def loop(x, state=None, segments=None, first=None):
    """Token by token, row by row; padding changes nothing and reads 0."""
    v, poles = x["v"], np.exp(x["log_poles"])[:, :, None, None]
    one = np.ones((*v.shape[:3], 1))
    q, k = (one if x[name] is None else x[name] for name in ("q", "k"))
    s = np.zeros((B, H, N, k.shape[-1], V), poles.dtype)
    if state is not None:
        s += state[:, :, :N] + 1j * state[:, :, N:] if np.iscomplexobj(poles) else state
    o = np.zeros_like(v)
    for row in range(B):
        current = None if first is None else first[row]
        for t in range(v.shape[1]):
            if segments is not None:
                if segments[row, t] == 0:
                    continue
                if segments[row, t] != current:
                    s[row], current = 0, segments[row, t]
            s[row] = poles * s[row] + np.einsum("hk,hv->hkv", k[row, t], v[row, t])[:, None]
            o[row, t] = np.einsum("hk,hn,hnkv->hv", q[row, t], x["residues"], s[row]).real
    return o, np.concatenate([s.real, s.imag], axis=2) if np.iscomplexobj(s) else s


def narrow(x):
    return x if x is None else jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


@pytest.mark.parametrize(
    ("backend", "chunk", "kind", "keys"),
    [
        ("xla", 4, complex, True),
        *(
            pytest.param(*case, marks=pytest.mark.more)
            for case in (
                ("xla", 4, float, False),
                ("xla", 4, complex, False),
                ("xla", None, float, True),
                ("xla", None, complex, True),
                ("reference", None, float, False),
                ("reference", None, complex, True),
            )
        ),
    ],
)
def test_outputs_and_states_are_the_loops(backend, chunk, kind, keys):
    x, state = arrays(kind, keys)
    given = {name: narrow(value) for name, value in x.items()}

    @functools.partial(jax.jit, static_argnames="return_state")
    def run(return_state=True, **settings):
        return modal_recurrence(**given, backend=backend, chunk_size=chunk, return_state=return_state, **settings)

    packed = {
        "initial_state": narrow(state),
        "segment_ids": jnp.asarray(SEGMENTS),
        "initial_segment": jnp.asarray(FIRST),
    }
    for settings, expected in (
        ({}, loop(x)),
        ({"initial_state": narrow(state)}, loop(x, state)),
        (packed, loop(x, state, SEGMENTS, FIRST)),
    ):
        for result, wanted in zip(run(**settings), expected, strict=True):
            assert_close(result, wanted)
    o, none = run(segment_ids=jnp.asarray(SEGMENTS), return_state=False)
    assert none is None
    assert_close(o, loop(x, None, SEGMENTS)[0])


@pytest.mark.more
def test_gradients_are_the_references_and_padding_may_hold_anything():
    x, state = arrays(t=200)
    x, state = {name: narrow(value) for name, value in x.items()}, narrow(state)
    segments = jnp.asarray(np.repeat(SEGMENTS, 16, axis=1)[:, :200])
    tokens = {name: x.pop(name) for name in ("q", "k", "v")}

    def loss(backend, tokens, state, log_poles, residues):
        settings = {"segment_ids": segments, "initial_state": state, "initial_segment": jnp.asarray(FIRST)}
        modes = {"log_poles": log_poles, "residues": residues, "backend": backend}
        o, last = modal_recurrence(**tokens, **modes, return_state=True, **settings)
        return jnp.sum(jnp.sin(o)) + jnp.sum(last**2)

    poisoned = {name: jnp.where((segments != 0)[..., None, None], value, jnp.nan) for name, value in tokens.items()}
    xla, reference = (jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2, 3))) for name in ("xla", "reference"))
    clean, expected = xla(tokens, state, *x.values()), reference(tokens, state, *x.values())
    for result, wanted in zip(jax.tree.leaves(clean), jax.tree.leaves(expected), strict=True):
        assert_close(result, np.asarray(wanted), 1e-5)
        assert np.abs(np.asarray(wanted)).max() > 0.01
    for result, wanted in zip(jax.tree.leaves(xla(poisoned, state, *x.values())), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_one_token_with_a_state_is_a_step():
    x, state = arrays(t=1)
    with recorded_choices() as choices:
        result = modal_recurrence(
            **{name: narrow(value) for name, value in x.items()}, initial_state=narrow(state), return_state=True
        )
    assert choices == []
    for actual, expected in zip(result, loop(x, state), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": jnp.zeros((2, 3))}, r"v must be \(b, t, h, v\)"),
        ({"log_poles": jnp.zeros((2, 4))}, r"log_poles must be \(3, n\); got \(2, 4\)"),
        ({"residues": jnp.zeros((3, 4))}, r"log_poles \(complex .*residues \(real .* both be real or both complex"),
        ({"q": None}, "q and k must both be given, or neither"),
        ({"k": jnp.zeros((2, 13, 3, 1))}, r"q and k must be \(2, 13, 3\)"),
        ({"initial_state": jnp.zeros((2, 3, 4, 2, 5))}, r"initial_state must be \(2, 3, 8, 2, 5\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"segment_ids": SEGMENTS, "initial_state": jnp.zeros((2, 3, 8, 2, 5))}, "needs initial_segment"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    x = {name: narrow(value) for name, value in arrays()[0].items()}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(modal_recurrence)(**(x | changes))  # before tests' checks of shapes
