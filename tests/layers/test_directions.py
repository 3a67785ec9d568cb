"""Recurrent mixers in both directions: forward, plus backward over the reversed tokens of each document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers.directions import DirectedConfig, backward_context
from recollect.layers.mixer import Context, Place

SEGMENTS = np.array([[3, 3, 3, 0, 5, 5, 5, 5, 0], [1, 0, 2, 2, 2, 2, 2, 2, 2]])
WIDTH = 4
DIRECTED = [cls for cls in layers.MIXERS if issubclass(cls, DirectedConfig)]


def min_gru(weights, x, order):
    """minGRU token by token, over tokens in the order given, restarted at each document; Feng et al. 2024, section
    3.1."""
    rows = []
    for row, segments in enumerate(SEGMENTS):
        h, document, out = 0.0, None, [jnp.zeros(WIDTH)] * len(segments)
        for token in order(range(len(segments))):
            if segments[token] == 0:
                continue
            if segments[token] != document:
                h, document = jnp.zeros(WIDTH), segments[token]
            update = jax.nn.sigmoid(x[row, token] @ weights["update"]["kernel"] + weights["update"]["bias"])
            h = (1 - update) * h + update * (x[row, token] @ weights["candidate"]["kernel"])
            out[token] = h @ weights["output"]["kernel"]
        rows.append(jnp.stack(out))
    return jnp.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_both_directions_are_the_loop_over_tokens_forward_and_backward(tied):
    config = layers.MinGRU(causal=False, tied=tied)
    graph, params = nnx.split(config.build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0))))
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    x = jax.random.normal(jax.random.key(1), (*SEGMENTS.shape, WIDTH))
    real = jnp.asarray(SEGMENTS != 0)[..., None]

    def loss(params, x):
        out = nnx.merge(graph, params)(x, Context(segments=jnp.asarray(SEGMENTS))).hidden
        return jnp.sum(jnp.where(real, jnp.sin(out), 0)), out

    def expected_loss(params, x):
        weights = nnx.to_pure_dict(params)
        weights = {"backward": weights["forward"]} | weights if tied else weights
        out = min_gru(weights["forward"], x, list) + min_gru(weights["backward"], x, reversed)
        return jnp.sum(jnp.where(real, jnp.sin(out), 0)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(expected_loss, argnums=(0, 1), has_aux=True))(params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(jnp.where(real, out, 0), jnp.where(real, expected, 0))
    jax.tree.map(close, grads, expected_grads)


@pytest.mark.parametrize("cls", DIRECTED, ids=lambda cls: cls.__name__)
def test_every_recurrent_mixer_has_weights_for_each_direction(cls):
    def parameters(**fields):
        config = cls(**fields)
        module = nnx.eval_shape(lambda: config.build(16, Place(), nnx.Rngs(params=jax.random.key(0))))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    causal = parameters()
    assert parameters(causal=False) == 2 * causal
    assert parameters(causal=False, tied=True) == causal
    traits = cls(causal=False).traits
    assert not traits.causal and not traits.streams and traits.symmetry is None


def test_positions_backward_count_from_each_documents_last_token():
    segments = jnp.asarray(SEGMENTS)
    positions = jnp.asarray([[0, 1, 4, 9, 2, 3, 4, 8, 9], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    back = backward_context(Context(positions=positions, segments=segments, fields={"ring": positions}))
    assert np.array_equal(back.segments, SEGMENTS[:, ::-1]) and np.array_equal(back.fields["ring"], positions[:, ::-1])
    counted = np.where(SEGMENTS[:, ::-1] != 0, back.positions, -1)
    assert counted.tolist() == [[-1, 0, 4, 5, 6, -1, 0, 3, 4], [0, 1, 2, 3, 4, 5, 6, -1, 0]]
    alone = backward_context(Context(positions=positions[:1, :3]))
    assert alone.positions.tolist() == [[0, 3, 4]] and backward_context(Context()) == Context()


def test_what_both_directions_cannot_do_is_refused():
    with pytest.raises(UserError, match="tied=True shares weights between two directions: set causal=False"):
        layers.Mamba2(tied=True)
    mixer = layers.MinGRU(causal=False).build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0)))
    with pytest.raises(UserError, match=r"MinGRU\(causal=False\) reads later tokens, so it cannot stream or generate"):
        mixer.init_state(1, 8)
