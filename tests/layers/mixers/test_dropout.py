"""Dropout of softmax weights: what is dropped follows from (seed, step) and the layer; nothing in evaluation."""

from __future__ import annotations

import inspect

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers.mixer import Context, Place
from recollect.models import LanguageModel, repeat
from recollect.models.activations import activations
from recollect.pallas_kernels.softmax_attention import softmax_attention

T, WIDTH, KEY = 70, 16, jax.random.key(5)


def built(config):
    return config.build(WIDTH, Place(0, 2), nnx.Rngs(params=jax.random.key(0)))


def inputs(b=2, t=T):
    return jax.random.normal(jax.random.key(1), (b, t, WIDTH))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "masked", [{}, {"window": 3}, {"query_segments": jnp.array([[1] * 40 + [2] * 25 + [0] * 5] * 2)}]
)
def test_backends_drop_the_same_weights(masked, sinks):
    q, k, v = (jax.random.normal(jax.random.key(n), (2, T, h, 4)) for n, h in ((0, 4), (1, 2), (2, 2)))
    factors = jnp.where(jax.random.bernoulli(KEY, 0.6, (2, 4, T, T)), 1 / 0.6, 0)
    call = dict(masked, sinks=jnp.arange(4.0) if sinks else None, dropout=factors, return_lse=True)

    def run(backend):
        def loss(q, k, v):
            out, lse = softmax_attention(q, k, v, backend=backend, **call)
            return jnp.sum(jnp.sin(out)), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for one, other in zip(jax.tree.leaves(run("xla")), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_weights_are_dropped_after_the_softmax_in_float64():
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(n), (1, 7, 2, 4)), np.float64) for n in range(3))
    factors = np.asarray(jax.random.bernoulli(KEY, 0.5, (1, 2, 7, 7)), np.float64) / 0.5
    expected = np.zeros((7, 2, 4))
    for i in range(7):
        for h in range(2):
            weights = np.exp(q[0, i, h] @ k[0, : i + 1, h].T / 2)
            expected[i, h] = (weights / weights.sum() * factors[0, h, i, : i + 1]) @ v[0, : i + 1, h]
    out = softmax_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), dropout=jnp.asarray(factors, jnp.float32)
    )
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_named():
    q = jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"dropout must be \(1, 2, 8, 8\)"):
        inspect.unwrap(softmax_attention)(q, q, q, dropout=jnp.ones((1, 2, 8, 7)))


@pytest.mark.parametrize(
    "config",
    [
        layers.Attention(heads=2),
        layers.SlidingWindow(heads=2, window=9),
        layers.LatentAttention(heads=2),
        layers.DifferentialAttention(heads=2),
        layers.ForgettingAttention(heads=2),
        layers.MixtureOfHeads(heads=4, shared=1, active=1),
        layers.BlockSelection(heads=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_mixers_drop_in_training_alone(config):
    plain, module = built(config), built(chz.replace(config, dropout=0.4))
    x = inputs()
    one, same, other = (module(x, Context(key=jax.random.key(n))).hidden for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other) and np.all(np.isfinite(one))
    np.testing.assert_array_equal(module(x).hidden, plain(x).hidden)


def test_layers_drop_different_weights_and_the_same_scanned_or_not():
    def model(**settings):
        mixer = layers.Attention(heads=2, dropout=0.5)
        config = LanguageModel(width=WIDTH, stages=repeat(mixer, depth=3), **settings)
        return config.build(11, nnx.Rngs(params=0))

    tokens = jnp.arange(24).reshape(2, 12) % 11
    scanned, unrolled = model(), model(unroll=True)
    one = scanned.hidden(tokens, Context(key=KEY)).hidden
    np.testing.assert_allclose(one, unrolled.hidden(tokens, Context(key=KEY)).hidden, rtol=1e-5, atol=1e-5)
    # The parts of a diagnosis are those of the step.
    *_, (_, last) = activations(scanned, tokens, Context(key=KEY))
    np.testing.assert_allclose(one, last, rtol=1e-5, atol=1e-5)
    assert np.any(one != scanned.hidden(tokens).hidden)


def test_landmark_refuses_it():
    with pytest.raises(UserError, match=r"dropout=0\.1: Landmark's grouped softmax"):
        layers.Landmark(dropout=0.1)
    with pytest.raises(UserError, match=r"dropout=1\.0: must be in \[0, 1\)"):
        layers.Attention(dropout=1.0)
