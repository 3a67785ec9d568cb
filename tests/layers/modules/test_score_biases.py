"""Biases of scores by distance, and rates of scaled rotary positions, against loops from their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import Attention, LinearAttention, MixtureOfHeads, Place
from recollect.layers.modules import (
    LRPE,
    Alibi,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RelativeBias,
    Rotary,
    YaRN,
)

RNGS = nnx.Rngs(params=jax.random.key(0))


def bucket(distance, buckets, largest):
    """T5's definition for keys before the query, token by token."""
    exact = buckets // 2
    if distance < exact:
        return distance
    return min(buckets - 1, exact + math.floor(math.log(distance / exact, largest / exact) * (buckets - exact) + 1e-9))


@pytest.mark.parametrize(("buckets", "largest"), [(32, 128), (8, 20), (32, 256)])
def test_buckets_hold_t5s_distances(buckets, largest):
    module = RelativeBias(buckets=buckets, distance=largest).build_in(16, 2, 8, RNGS)
    distances = np.arange(400)
    bias = np.asarray(module.of_distance(jnp.asarray(distances)[None, :, None]))[0, :, :, 0]
    expected = np.asarray(module.buckets[...])[[bucket(d, buckets, largest) for d in distances]].T
    np.testing.assert_array_equal(bias, expected)
    assert abs(np.std(RelativeBias().build_in(1024, 64, 8, RNGS).buckets[...]) * 32 - 1) < 0.05


@pytest.mark.parametrize("positions", [Alibi(), RelativeBias(buckets=4, distance=6)])
def test_attention_adds_it_to_scores(positions):
    """Against one query and one head at a time, from the definition, in float64."""
    mixer = Attention(heads=2, positions=positions).build(8, Place(), nnx.Rngs(params=jax.random.key(1)))
    x = np.random.default_rng(0).normal(size=(1, 12, 8)) * 3

    def projected(linear):
        return (x[0] @ np.asarray(linear.kernel[...], np.float64)).reshape(12, 2, 4) * 20

    for linear in (mixer.query, mixer.key, mixer.value):
        linear.kernel[...] = linear.kernel[...] * 20
    q, k, v = (projected(linear) / 20 for linear in (mixer.query, mixer.key, mixer.value))
    out = np.zeros((12, 2, 4))
    for h in range(2):
        for i in range(12):
            scores = np.array([q[i, h] @ k[j, h] / 2 for j in range(i + 1)])
            for j in range(i + 1):
                if isinstance(positions, Alibi):
                    scores[j] -= 2.0 ** (-4 * (h + 1)) * (i - j)
                else:
                    scores[j] += mixer.positions.buckets[...][bucket(i - j, 4, 6), h]
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[: i + 1, h]
    expected = out.reshape(12, 8) @ np.asarray(mixer.output.kernel[...], np.float64)
    np.testing.assert_allclose(
        mixer(jnp.asarray(x, jnp.float32)).hidden[0], expected, atol=1e-5 * np.abs(expected).max()
    )


def test_scaled_rates():
    """Pair by pair, from the papers."""
    dim, base, s, original = 64, 10_000.0, 8.0, 4096
    plain = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
    turns = original * plain / (2 * math.pi)
    np.testing.assert_allclose(LinearScaling(factor=s).rates(base, dim), plain / s, rtol=1e-6)
    ntk = NTKScaling(factor=s).rates(base, dim)
    np.testing.assert_allclose([ntk[0], ntk[-1]], [1, plain[-1] / s], rtol=1e-5)
    yarn = YaRN(factor=s, original=original)
    rates = yarn.rates(base, dim)
    np.testing.assert_allclose(rates[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(rates[turns < 0.75], plain[turns < 0.75] / s, rtol=1e-6)
    assert np.all(np.diff(rates) < 0) and abs(yarn.amplitude - (0.1 * math.log(8) + 1)) < 1e-12
    llama = Llama3Scaling(factor=s, original=original).rates(base, dim)
    for i in range(dim // 2):
        smooth = (turns[i] - 1) / (4 - 1)
        mixed = (1 - smooth) * plain[i] / s + smooth * plain[i]
        expected = plain[i] if turns[i] > 4 else plain[i] / s if turns[i] < 1 else mixed
        np.testing.assert_allclose(llama[i], expected, rtol=1e-6)


def test_rotary_turns_by_its_scaled_rates():
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 16))
    at = jnp.arange(5)[None] * 8
    np.testing.assert_allclose(Rotary(scaling=LinearScaling(factor=8.0))(x, at), Rotary()(x, at // 8), atol=1e-5)
    scaled = Rotary(fraction=0.5, scaling=YaRN(factor=4.0, original=64))
    y = scaled(x, at)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    ratio = jnp.linalg.norm(y[..., :8], axis=-1) / jnp.linalg.norm(x[..., :8], axis=-1)
    np.testing.assert_allclose(ratio, scaled.scaling.amplitude, rtol=1e-5)


def test_lrpe_scores_by_the_cosine_of_each_distance():
    module = LRPE(heads=2, dim=4)
    np.testing.assert_allclose(module.theta[...].reshape(-1), [10_000 ** (-2 * j / 8) for j in range(8)], rtol=1e-5)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 4))
    at = jnp.arange(6)[None]
    scores = jnp.einsum("bthk,bshk->bhts", module(q, at), module(k, at))
    theta = np.asarray(module.theta[...], np.float64)
    for h in range(2):
        for i in range(6):
            for j in range(6):
                expected = sum(q[0, i, h, d] * k[0, j, h, d] * math.cos((i - j) * theta[h, d]) for d in range(4))
                assert abs(scores[0, h, i, j] - expected) < 1e-5


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"distance=16: must be above the 16 distances"):
        RelativeBias(distance=16)
    with pytest.raises(UserError, match=r"factor=0\.5"):
        YaRN(factor=0.5)
    with pytest.raises(UserError, match="MixtureOfHeads adds no bias"):
        MixtureOfHeads(positions=Alibi())
    with pytest.raises(UserError, match="LinearAttention takes Rotary"):
        LinearAttention(positions=Alibi())
