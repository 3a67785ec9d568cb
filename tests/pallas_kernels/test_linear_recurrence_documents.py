"""A state per document of packed rows: each document beside a call of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.dispatch import interpreted
from recollect.pallas_kernels.linear_recurrence import linear_recurrence

B, T, N, H, K, V = 2, 41, 4, 2, 5, 3
SEGMENTS = np.array(
    [[0, 0] + [7] * 9 + [0] + [3] + [8] * 11 + [0, 0] + [2] * 15, [5] * 20 + [0] * 3 + [5] * 4 + [6] * 14]
)
"""Four documents, with padding before, between and inside them; two, of which the first has padding inside."""


def arguments():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape)

    unit = normal(B, T, H, K)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    return {
        "q": normal(B, T, 1, K),
        "k": normal(B, T, 1, K),
        "v": normal(B, T, H, V),
        "log_decay": -rng.exponential(0.3, (B, T, H, K)),
        "write_strength": rng.random((B, T, H, V)),
        "erase_read": unit * rng.random((B, T, H, 1)),
        "erase_write": unit,
        "initial_state": normal(B, N, H, K, V),
    }


def loss(o, states):
    return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)) + jnp.sum(
        states * jnp.sin(jnp.arange(states.size)).reshape(states.shape)
    )


def alone(given):
    """A call per document, of its tokens without the padding."""
    o, states = jnp.zeros((B, T, H, V)), given["initial_state"]
    for row in range(B):
        tokens = np.flatnonzero(SEGMENTS[row])
        cuts = np.flatnonzero(np.diff(SEGMENTS[row, tokens])) + 1
        for number, places in enumerate(np.split(tokens, cuts)):
            rows = {name: x[row : row + 1, places] for name, x in given.items() if name != "initial_state"}
            state = given["initial_state"][row : row + 1, number]
            one, after = linear_recurrence(**rows, initial_state=state, return_state=True, backend="reference")
            o, states = o.at[row, places].set(one[0]), states.at[row, number].set(after[0])
    return loss(o, states), (o, states)


def packed(given, **settings):
    o, states = linear_recurrence(**given, segment_ids=jnp.asarray(SEGMENTS), return_state=True, **settings)
    return loss(o, states), (o, states)


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, arguments())
        gradients, outputs = jax.jit(jax.grad(alone, has_aux=True))(given)
    return given, outputs, gradients


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_each_document_is_a_call_of_its_own(expected, backend):
    given, outputs, gradients = expected
    settings = {"backend": backend, "chunk_size": 8}
    with jax.enable_x64(True):
        run = jax.jit(jax.grad(lambda given: packed(given, **settings), has_aux=True))
        found_gradients, found = run(given)
    for name, a, b in [("o", found[0], outputs[0]), ("states", found[1], outputs[1])] + [
        (name, found_gradients[name], gradients[name]) for name in given
    ]:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max(), err_msg=name)


def test_one_token_is_a_step_of_the_first_document():
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments())
    one = {name: x if name == "initial_state" else x[:, :1] for name, x in given.items()}
    o, states = linear_recurrence(**one, segment_ids=jnp.asarray([[4], [0]]), return_state=True)
    state = {"initial_state": one["initial_state"][:, 0]}
    alone, after = linear_recurrence(**(one | state), return_state=True)
    np.testing.assert_allclose(o, np.stack([alone[0], np.zeros((1, H, V))]), rtol=1e-6)
    np.testing.assert_allclose(states[0, 0], after[0], rtol=1e-6)
    np.testing.assert_array_equal(states[0, 1:], given["initial_state"][0, 1:])
    np.testing.assert_array_equal(states[1], given["initial_state"][1])


@pytest.mark.parametrize("backend", ["reference", pytest.param("xla", marks=pytest.mark.more)])
def test_more_documents_than_states_read_nan(backend):
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments())
    given["initial_state"] = given["initial_state"][:, :3]
    o, states = linear_recurrence(**given, segment_ids=jnp.asarray(SEGMENTS), return_state=True, backend=backend)
    last = SEGMENTS[0] == 2
    assert np.isnan(o[0, last]).all() and np.isfinite(o[0, ~last]).all() and np.isfinite(o[1]).all()
    assert np.isfinite(states).all()


def test_refusals():
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments())
    segments = {"segment_ids": jnp.asarray(SEGMENTS)}
    with pytest.raises(ValueError, match="a state per document needs segment_ids, and no initial_segment"):
        linear_recurrence(**given)
    with pytest.raises(ValueError, match="a state per document needs segment_ids, and no initial_segment"):
        linear_recurrence(**given, **segments, initial_segment=jnp.ones(B, int))
    with interpreted(), pytest.raises(ValueError, match="one state, not one per document"):
        linear_recurrence(**given, **segments, backend="pallas_tpu")
