"""Decays: constants per head, Mamba's steps and their initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.layers.modules import (
    Linear,
    LogSigmoidDecay,
    StepDecay,
    alibi_slopes,
    inverse_softplus,
    retnet_log_decays,
    spread_uniform,
)


def rngs(seed=0):
    return nnx.Rngs(params=jax.random.key(seed))


def test_constants_per_head():
    np.testing.assert_allclose(retnet_log_decays(4), np.log(1 - 2.0 ** (-5 - np.arange(4))), rtol=1e-6)
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2] and len(alibi_slopes(12)) == 12
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]  # those of 4, and two of 8


def test_numbers_are_spread_and_each_is_uniform():
    draws = np.stack([spread_uniform(jax.random.key(i), (2, 2), 1.0, 5.0) for i in range(2000)]).reshape(-1, 4)
    assert (np.sort(np.floor(draws), axis=1) == [1, 2, 3, 4]).all()  # one in every quarter
    for column in draws.T:
        assert abs(column.mean() - 3) < 0.1 and abs(column.std() - 4 / 12**0.5) < 0.05
        assert column.min() < 1.1 and column.max() > 4.9


def test_softplus_is_inverted():
    y = jnp.asarray([1e-4, 1e-3, 0.1, 1.0, 20.0])
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(y)), y, rtol=1e-3)


@pytest.mark.parametrize("channels", [0, 8])
def test_steps_are_mambas(channels):
    width, heads = 6, 5
    projection = Linear(width, heads * (channels or 1), "d hk", rngs())
    decay = StepDecay(heads, rngs(1), projection, rates=(1.0, 16.0), channels=channels)
    x = np.random.default_rng(0).normal(size=(2, 3, width))
    bias, rate = (np.asarray(p[...], np.float64) for p in (decay.step_bias, decay.log_rate))
    logits = (x @ np.asarray(projection.kernel[...], np.float64)).reshape(2, 3, *bias.shape) + bias
    step, log_a = np.log1p(np.exp(logits)), decay(jnp.asarray(x, jnp.float32))
    rate = np.exp(rate)[:, None] if channels else np.exp(rate)
    np.testing.assert_allclose(log_a[0], -rate * step, rtol=1e-5)
    np.testing.assert_allclose(log_a[1], step, rtol=1e-5)
    assert bias.shape == ((heads, channels) if channels else (heads,))
    assert not decay.step_bias.decay and not decay.log_rate.decay


def test_first_steps_and_rates_are_the_published_ones():
    decays = [StepDecay(8, rngs(i), Linear(4, 8, "d h", rngs()), rates=(1.0, 16.0)) for i in range(60)]
    steps = np.concatenate([np.log1p(np.exp(np.asarray(d.step_bias[...], np.float64))) for d in decays])
    rates = np.concatenate([np.exp(np.asarray(d.log_rate[...], np.float64)) for d in decays])
    assert steps.min() > 0.00099 and steps.max() < 0.1001
    logs = np.log(steps)  # uniform between log 0.001 and log 0.1
    assert abs(logs.mean() - math.log(0.01)) < 0.05 and abs(logs.std() - math.log(100) / 12**0.5) < 0.05
    assert rates.min() >= 1 and rates.max() <= 16 and abs(rates.mean() - 8.5) < 0.1


def test_logsigmoid_decays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    projection = Linear(4, 6, "d hk", rngs(), bias=True)
    expected = np.log(1 / (1 + np.exp(-np.asarray(projection(x), np.float64)))).reshape(2, 3, 2, 3) / 16
    np.testing.assert_allclose(LogSigmoidDecay(projection, 2, 16.0)(x), expected, rtol=1e-5)
