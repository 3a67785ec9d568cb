"""Sliding windows: how many keys are seen, both kinds of sinks, and a state that does not grow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Place
from recollect.layers.mixers.sliding_window import SlidingWindow
from recollect.layers.modules.positions import Rotary
from tests.layers.mixers.test_attention import (
    CLOSE,
    WIDTH,
    assert_documents_stand_alone,
    assert_streams,
    build,
    by_formula,
    error,
    full,
    tokens,
    weight_gradients,
)

CONFIGS = [
    SlidingWindow(window=4, heads=2, key_heads=1, positions=Rotary()),
    SlidingWindow(window=3, heads=2, sinks="learned"),
    SlidingWindow(window=3, heads=2, positions=Rotary(), sinks="first", first=2),
    SlidingWindow(window=1, sinks="first", first=5),
    SlidingWindow(window=40, sinks="first"),
]


def name(config: SlidingWindow) -> str:
    return f"{config.window}-{config.sinks}"


def saw(config: SlidingWindow, t: int) -> np.ndarray:
    """(t, t) bool: whether output i depends on input j, from the Jacobian."""
    mixer = build(config)
    jacobian = jax.jit(jax.jacobian(lambda x: jnp.sum(full(mixer, x[None])[0], axis=-1)))(tokens(1, t)[0])
    return np.any(np.asarray(jacobian) != 0, axis=-1)


@pytest.mark.parametrize(("window", "t"), [(3, 9), (5, 70)])
def test_a_window_sees_that_many_keys(window, t):
    """The second length is long enough for the banded form."""
    i, j = np.arange(t)[:, None], np.arange(t)
    assert np.array_equal(saw(SlidingWindow(window=window), t), (j <= i) & (j > i - window))


@pytest.mark.parametrize("t", [9, 70])
def test_first_tokens_stay_visible(t):
    i, j = np.arange(t)[:, None], np.arange(t)
    found = saw(SlidingWindow(window=3, sinks="first", first=2), t)
    assert np.array_equal(found, (j <= i) & ((j > i - 3) | (j < 2)))


def test_follows_the_formula():
    mixer = build(
        SlidingWindow(
            window=3,
            heads=4,
            key_heads=2,
            positions=Rotary(base=100.0),
            query_key_norm=True,
            bias=True,
            sinks="first",
            first=2,
        )
    )
    i, j = np.arange(9)[:, None], np.arange(9)
    x = tokens(1, 9)
    expected = by_formula(mixer, np.asarray(x[0], np.float64), (j <= i) & ((j > i - 3) | (j < 2)), 2)
    assert error(full(mixer, x)[0], expected) < CLOSE


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_documents_stand_alone(config):
    assert_documents_stand_alone(config)


@pytest.mark.parametrize("sizes", [(1,) * 24, (4, 4, 9, 4, 3)], ids=len)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_streams(config, sizes):
    assert_streams(config, sizes)


def test_first_tokens_cost_no_square_and_change_nothing():
    """One document takes two merged softmaxes; the same document with its segments spelled out takes one under a
    mask."""
    mixer, x = build(CONFIGS[2]), tokens(2, 80)
    spelled = Context(segments=jnp.ones((2, 80), jnp.int32))
    assert error(full(mixer, x), full(mixer, x, spelled)) < CLOSE
    got, expected = weight_gradients(mixer, x, Context()), weight_gradients(mixer, x, spelled)
    for leaf, leaf_ in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert error(leaf, leaf_) < 2 * CLOSE


def test_a_learned_sink_takes_weight_and_starts_at_zero():
    config = SlidingWindow(window=2, heads=2, sinks="learned")
    mixer = build(config)
    fresh = config.build(WIDTH, Place(), nnx.Rngs(0))
    assert np.all(np.asarray(fresh.sinks[...]) == 0)
    x = tokens(1, 1)
    mixer.sinks[...] = jnp.array([40.0, 40.0])
    assert np.max(np.abs(full(mixer, x))) < 1e-10  # all the weight goes to the sink, which has no value
    # One key: its weight is sigmoid(score - sink), and without sinks 1.
    mixer.sinks[...] = jnp.array([0.5, 0.5])
    plain = build(SlidingWindow(window=2, heads=2))
    plain.query, plain.key, plain.value, plain.output = mixer.query, mixer.key, mixer.value, mixer.output
    score = jnp.einsum("hk,hk->h", mixer.query(x).reshape(2, 8), mixer.key(x).reshape(2, 8)) * 8**-0.5
    values = mixer.value(x).reshape(2, 8) * jax.nn.sigmoid(score - 0.5)[:, None]
    assert error(full(mixer, x), mixer.output(values.reshape(1, 1, 16))) < CLOSE
    assert error(full(plain, x), mixer.output(mixer.value(x))) < CLOSE


def test_state_does_not_grow_with_the_stream():
    def size(config, length):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(build(config).init_state(1, length)))

    for config in CONFIGS[:3]:
        assert size(config, 64) == size(config, 4096)
    per_token = 2 * WIDTH * 4 + 2 * 4  # key, value, position and segment
    extra = size(CONFIGS[2], 64) - size(SlidingWindow(window=3, heads=2, positions=Rotary()), 64)
    assert extra == 2 * per_token
    assert size(SlidingWindow(window=64), 8) < size(SlidingWindow(window=64), 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, 'window=0 sees no key with sinks="none"'),
        ({"window": -1}, "window=-1"),
        ({"first": 0}, "first=0"),
        ({"heads": 0}, "heads=0"),
    ],
)
def test_impossible_configs_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        SlidingWindow(**fields)


def test_a_window_of_no_keys_sees_the_first_tokens_alone():
    config = SlidingWindow(window=0, sinks="first", first=2)
    mixer = config.build(8, Place(), nnx.Rngs(params=jax.random.key(1)))
    x = np.random.default_rng(0).normal(size=(9, 8)) * 20
    q, k, v = (x @ np.asarray(part.kernel[...], np.float64) for part in (mixer.query, mixer.key, mixer.value))
    expected = np.zeros((9, 8))
    for i in range(9):
        weights = np.exp([q[i] @ k[j] / np.sqrt(8) for j in range(min(i + 1, 2))])
        expected[i] = (weights / weights.sum()) @ v[: min(i + 1, 2)]
    expected = expected @ np.asarray(mixer.output.kernel[...], np.float64)
    out = mixer(jnp.asarray(x[None], jnp.float32)).hidden[0]
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
