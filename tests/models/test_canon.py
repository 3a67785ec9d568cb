"""Canon layers: a block against loops in float64, streams against whole sequences, documents, measured state bytes."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers.mixer import Context, Place
from recollect.layers.modules import GELU, RMSNorm, SwiGLU
from recollect.models import Canon, LanguageModel, activations, repeat
from recollect.models.canon_block import CanonBlock
from recollect.models.language_model import state_bytes
from tests.layers.mixers.test_softmax_family import attended, linear, rms, w

T, WIDTH = 11, 16


def moved(module):
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


def convolved(module, y):
    """y + conv(y), tap by tap."""
    taps, out = w(module.convolution.taps), np.array(y)
    for t in range(len(y)):
        for lag in range(min(4, t + 1)):
            out[t] += taps[lag] * y[t - lag]
    return out


@pytest.mark.parametrize("places", ["a", "b", "c", "d", "abcd"])
def test_a_block_is_the_published_one(places):
    config = LanguageModel(
        width=WIDTH,
        stages=repeat(layers.Attention(heads=2), depth=1),
        mlp=SwiGLU(hidden=12),
        canon=Canon(places=places),
    )
    block = moved(CanonBlock(layers.Attention(heads=2), config, Place(), nnx.Rngs(params=0)))
    x = np.random.default_rng(0).normal(size=(T, WIDTH))

    def at(place, module, y):
        return convolved(module, y) if place in places else y

    def norm(module, place):
        inner = module.norm if place in places else module
        return at(place, module, rms(stream, w(inner.gain)))

    stream = x
    y = norm(block.mixer_norm, "a")
    q, k, v = (
        at("b", part, linear(part, y)).reshape(T, 2, 8)
        for part in (block.mixer.query, block.mixer.key, block.mixer.value)
    )
    o = [attended(lambda i, j, h=h: q[i, h] @ k[j, h] / np.sqrt(8), v[:, h]) for h in range(2)]
    stream = stream + linear(block.mixer.output, np.concatenate(o, axis=-1))
    y = norm(block.mlp_norm, "c")
    gate, up = (at("d", part, linear(part, y)) for part in (block.mlp.gate, block.mlp.up))
    expected = stream + linear(block.mlp.down, gate / (1 + np.exp(-gate)) * up)
    out = block(jnp.asarray(x[None], jnp.float32), Context()).hidden[0]
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


MIXERS = [
    layers.SlidingWindow(window=5, heads=2),
    layers.LinearAttention(heads=2),
    layers.ShortConvolution(),
    layers.Landmark(heads=2, block=3),
    layers.RelativeConvolutionalAttention(maximum=64),
    layers.LatentAttention(rank=8, rotary_dim=4),
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: type(mixer).__name__)
def test_streams_documents_and_activations(mixer):
    config = LanguageModel(
        width=WIDTH, stages=repeat(mixer, depth=2), mlp=GELU(hidden=12), canon=Canon(), norm=RMSNorm()
    )
    model = moved(config.build(24, nnx.Rngs(params=0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 24)
    segments = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3, [3] * 24])
    whole = model.hidden(tokens, Context(segments=segments)).hidden
    real = np.asarray(segments != 0)[:, :, None]
    alone = model.hidden(tokens[:1, 9:21]).hidden
    np.testing.assert_allclose(whole[:1, 9:21], alone, atol=1e-4)
    state = model.init_state(2, 24)
    shape = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    step, outs = jax.jit(lambda tokens, state, segments: model.extend(tokens, state, Context(segments=segments))), []
    for start in range(0, 24, 3):
        out, state = step(tokens[:, start : start + 3], state, segments[:, start : start + 3])
        outs.append(out)
    np.testing.assert_allclose(np.where(real, jnp.concatenate(outs, axis=1), 0), np.where(real, whole, 0), atol=1e-4)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] == shape
    assert float(jnp.abs(dict(activations(model, tokens))["final norm"] - model.hidden(tokens).hidden).max()) < 1e-5


def test_state_bytes_are_three_inputs_of_each_convolution():
    plain = LanguageModel(width=WIDTH, stages=repeat(layers.Attention(heads=2), depth=2), mlp=SwiGLU(hidden=12))

    def measured(config):
        return state_bytes(config.build(24, nnx.Rngs(params=0)).init_state(1, 8))

    for places, channels in (("a", 16), ("b", 48), ("c", 16), ("d", 24), ("abcd", 104)):
        extra = measured(chz.replace(plain, canon=Canon(places=places))) - measured(plain)
        assert extra == 2 * (3 * channels * 4 + 8), places  # and a cursor: position and segment


def test_it_starts_as_torch_starts_a_convolution():
    config = LanguageModel(width=64, stages=repeat(layers.Attention(heads=2), depth=3), mlp=SwiGLU(), canon=Canon())
    taps = np.asarray(config.build(24, nnx.Rngs(params=0)).stack.stages[0][0].mixer_norm.convolution.taps[...])
    assert taps.shape == (3, 4, 64) and np.abs(taps).max() <= 0.5 and abs(np.std(taps) - 0.5 / 3**0.5) < 0.02
    assert len({layer.tobytes() for layer in taps}) == 3


def test_settings_that_cannot_be():
    for places in ("", "ae"):
        with pytest.raises(UserError, match="places="):
            Canon(places=places)
    stages = repeat(layers.Attention(heads=2), depth=1)
    with pytest.raises(UserError, match="mlp is None"):
        LanguageModel(width=WIDTH, stages=stages, canon=Canon()).build(24, nnx.Rngs(params=0))
