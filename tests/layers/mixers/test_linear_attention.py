"""Feature maps, and the mixer against its quadratic definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import LinearAttention
from recollect.layers.mixer import Context, Place
from recollect.layers.modules.feature_maps import EluPlusOne, Exp, Hedgehog, Identity, Relu, Taylor
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.pallas_kernels.dispatch import recorded_choices
from recollect.pallas_kernels.taylor_attention.features import count, packed

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 16)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 16)), jnp.float32)


def error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def dots(config, x, y):
    phi = config.build(x.shape[2], x.shape[3])
    assert phi(x).shape == (*x.shape[:3], config.features(x.shape[3])) and phi(x).dtype == jnp.float32
    return np.sum(np.asarray(phi(x), np.float64) * np.asarray(phi(y), np.float64), axis=-1)


@pytest.mark.parametrize("k", [1, 3, 16])
def test_taylor_products_are_the_series(k):
    x, y = X[..., :k], Y[..., :k]
    s = np.sum(np.asarray(x, np.float64) * np.asarray(y, np.float64), axis=-1) / k**0.5
    found = dots(Taylor(), x, y)
    assert error(found, 1 + s + s**2 / 2) < 1e-6
    assert found.min() > 0.5 - 1e-6
    assert Taylor().features(k) == 1 + k + k * (k + 1) // 2


def test_packed_taylor_features_are_153_at_16():
    assert Taylor().features(16) == 153
    assert Taylor().build(1, 16)(X).shape[-1] == 153


@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_kernels_pack_features_as_the_map_does(k):
    """So that a state means the same to both."""
    assert Taylor().features(k) == count(k)
    np.testing.assert_allclose(packed(X[..., :k]), Taylor().build(3, k)(X[..., :k]), rtol=1e-6, atol=1e-7)


def test_simple_maps():
    x, y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    phi = {
        EluPlusOne(): np.where(x > 0, x + 1, np.exp(x)),
        Relu(epsilon=0.25): np.maximum(x, 0) + 0.25,
        Exp(): np.exp(x),
    }
    for config, expected in phi.items():
        assert error(config.build(3, 16)(X), expected) < 1e-6 and config.features(16) == 16 and config.positive
    assert error(dots(Identity(), X, Y), np.sum(x * y, axis=-1) / 4) < 1e-6  # softmax's 1/sqrt(16)


def test_relu_keeps_a_product_positive():
    assert np.all(dots(Relu(), -jnp.abs(X), jnp.abs(Y)) > 0)  # without epsilon: orthogonal
    assert np.all(dots(Relu(epsilon=0.0), -jnp.abs(X), jnp.abs(Y)) == 0)
    with pytest.raises(UserError, match=r"epsilon=-1\.0"):
        Relu(epsilon=-1.0)


def test_hedgehog_starts_at_the_identity():
    phi = Hedgehog().build(3, 16)
    x = np.asarray(X, np.float64)
    e = np.exp(2 * np.concatenate([x, -x], axis=-1))
    assert error(phi(X), e / e.sum(-1, keepdims=True)) < 1e-6 and Hedgehog().features(16) == 32
    assert phi.kernel.shape == (3, 16, 16) and phi.bias.shape == (3, 16)
    # Heads have maps of their own: changing one head's moves that head only.
    phi.kernel[...] = phi.kernel[...].at[1].multiply(-1.0)
    moved = np.abs(np.asarray(phi(X)) - e / e.sum(-1, keepdims=True)).max(axis=(0, 1, 3))
    assert moved[1] > 0.1 and max(moved[0], moved[2]) < 1e-6


def test_maps_are_fp32_for_half_precision():
    for config in (Taylor(), Exp(), Hedgehog()):
        assert config.build(3, 16)(X.astype(jnp.bfloat16)).dtype == jnp.float32


def test_free_signs_refuse_a_normaliser():
    with pytest.raises(UserError, match=r"Identity.*normalise=False"):
        LinearAttention(feature_map=Identity())
    assert LinearAttention(feature_map=Identity(), normalise=False).normalise is False


def build(config, width=12):
    mixer = config.build(width, Place(0, 2), nnx.Rngs(params=jax.random.key(0)))
    graph, state = nnx.split(mixer)
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


def test_retnet_decays():
    log_decay = build(LinearAttention(heads=4, decay="retnet"))._log_decay()
    gamma = 1 - 2.0 ** (-5 - np.arange(4))
    np.testing.assert_allclose(np.asarray(log_decay, np.float64), np.log(gamma), rtol=1e-6)
    assert build(LinearAttention(heads=4))._log_decay() is None


CONFIGS = {
    "taylor": LinearAttention(heads=3, feature_dim=5, epsilon=0.5),
    "taylor rotary": LinearAttention(heads=2, positions=Rotary(base=10.0), chunk=4, normalise=False),
    "taylor retnet": LinearAttention(heads=2, feature_dim=4, decay="retnet", output_norm=True),
    "relu retnet": LinearAttention(heads=2, feature_map=Relu(epsilon=0.1), decay="retnet", chunk=4),
    "elu rotary": LinearAttention(heads=2, feature_map=EluPlusOne(), positions=Rotary(base=10.0), chunk=4),
    "retnet": LinearAttention(heads=3, feature_map=Identity(), normalise=False, decay="retnet", output_norm=True),
    "hedgehog": LinearAttention(heads=2, feature_map=Hedgehog()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mixer_is_its_definition(name):
    config, t, width = CONFIGS[name], 13, 12
    mixer = build(config)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, t, width)), jnp.float32)

    def heads(linear):
        return np.asarray(x @ linear.kernel[...], np.float64).reshape(2, t, config.heads, -1)

    q, k, v = heads(mixer.query), heads(mixer.key), heads(mixer.value)
    assert q.shape[-1] == (config.feature_dim or width // config.heads)
    if config.positions is not None:
        q, k = (
            np.asarray(config.positions(jnp.asarray(y, jnp.float32), jnp.broadcast_to(jnp.arange(t), (2, t))))
            for y in (q, k)
        )
    q, k = (
        np.asarray(phi(jnp.asarray(y, jnp.float32)), np.float64)
        for phi, y in ((mixer.query_features, q), (mixer.key_features, k))
    )
    weights = np.einsum("bihk,bjhk->bhij", q, k) * np.tril(np.ones((t, t)))
    if config.decay == "retnet":
        gamma = 1 - 2.0 ** (-5 - np.arange(config.heads))
        weights = weights * gamma[:, None, None] ** np.maximum(np.arange(t)[:, None] - np.arange(t), 0)
    o = np.einsum("bhij,bjhv->bihv", weights, v)
    if config.normalise:
        o = o / (np.moveaxis(weights.sum(-1), 1, 2)[..., None] + config.epsilon)
    if config.output_norm:
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(mixer.output_norm.gain[...])
    expected = o.reshape(2, t, width) @ np.asarray(mixer.output.kernel[...], np.float64)
    assert error(jax.jit(lambda x: mixer(x).hidden)(x), expected) < 5e-6


def test_the_state_is_packed_and_of_one_size():
    mixer = build(LinearAttention(heads=2, feature_dim=16), width=8)
    for length in (10, 100_000):
        state = mixer.init_state(3, length, jnp.bfloat16)
        assert state.parts["memory"].shape == (3, 2, 153, 4 + 1) and state.parts["memory"].dtype == jnp.float32
    free = build(LinearAttention(heads=2, feature_map=Identity(), normalise=False), width=8).init_state(3, 10)
    assert free.parts["memory"].shape == (3, 2, 4, 4)  # no column for a normaliser


def test_taylor_features_without_decay_have_their_operation():
    x = jnp.ones((1, 3, 12))
    for name, operation in {
        "taylor": "taylor_attention",
        "taylor retnet": "linear_recurrence",
        "hedgehog": "linear_recurrence",
    }.items():
        with recorded_choices() as choices:
            jax.eval_shape(lambda x, mixer=build(CONFIGS[name]): mixer(x).hidden, x)
        assert [choice.operation for choice in choices] == [operation]


def test_taylor_decodes_by_steps():
    """A token at a time, with padding and a new document on the way, equals the whole; and no chunked form runs for
    it."""
    mixer = build(CONFIGS["taylor"])
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 9, 12)), jnp.float32)
    segments = jnp.asarray([[1, 1, 0, 1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4, 0, 0, 4]], jnp.int32)
    expected = mixer(x, Context(segments=segments)).hidden
    step, state = (
        jax.jit(lambda x, state, segments: mixer.extend(x, state, Context(segments=segments))),
        mixer.init_state(2, 9),
    )
    with recorded_choices() as choices:
        for i in range(9):
            output, state = step(x[:, i : i + 1], state, segments[:, i : i + 1])
            assert error(output.hidden[:, 0][segments[:, i] != 0], expected[:, i][segments[:, i] != 0]) < 5e-6
    assert choices == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"feature_dim": 0}, "feature_dim=0"),
        ({"epsilon": 0.0}, r"epsilon=0\.0"),
        ({"positions": LearnedPositions()}, "Rotary positions or none"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LinearAttention(**settings)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="heads=5 does not divide the model width 12"):
        LinearAttention(heads=5).build(12, Place(), nnx.Rngs(params=jax.random.key(0)))
