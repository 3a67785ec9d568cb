"""Attention's parameters in other mixers: where they compute the same, exactly the same."""

import functools

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Attention, Landmark, LinearAttention, MixtureOfHeads, SlidingWindow
from recollect.layers.modules import Hedgehog, Rotary, SwiGLU
from recollect.models import FunctionalModel, LanguageModel, Stage, converted, flatten, repeat

SHARED = {"heads": 4, "key_heads": 2, "positions": Rotary()}
BEFORE = LanguageModel(width=16, stages=repeat(Attention(**SHARED), depth=2), mlp=SwiGLU(hidden=24))
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 11)
WINDOWED = SlidingWindow(window=5, sinks="first", first=2, **SHARED)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)  # larger than initial values, so that attention is far from uniform
    shapes = FunctionalModel(BEFORE, 11).abstract_params()
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.4, shapes)


@functools.cache
def program(model):
    return jax.jit(lambda params: FunctionalModel(model, 11).bind(params)(TOKENS))


def logits(model, params):
    return np.asarray(program(model)(params))


def becomes(params, *mixers):
    """Logits of the model whose second layer, or both, is one of these mixers."""
    after = chz.replace(BEFORE, stages=repeat(*(Attention(**SHARED), *mixers)[-2:], depth=2))
    return logits(after, converted(params, BEFORE, after, 11))


@pytest.mark.parametrize(
    ("mixer", "same"),
    [
        (MixtureOfHeads(shared=1, active=3, gates="ones", **SHARED), 13),  # all heads are on
        (MixtureOfHeads(shared=1, active=3, gates="code", **SHARED), 13),
        (Landmark(block=6, **SHARED), 6),  # then comes the first landmark
        (WINDOWED, 6),  # the second of 6 tokens is seen as one of the first two
    ],
    ids=["heads, ones", "heads, code", "landmark", "window"],
)
def test_what_must_be_the_same_is(params, mixer, same):
    before, after = logits(BEFORE, params), becomes(params, mixer)
    np.testing.assert_allclose(after[:, :same], before[:, :same], rtol=1e-5, atol=1e-5)
    if same < 13:
        assert np.abs(after[:, same + 1 :] - before[:, same + 1 :]).max() > 1e-2


def test_all_heads_on_are_the_original_bit_for_bit(params):
    mixer = MixtureOfHeads(shared=2, active=2, gates="ones", **SHARED)
    np.testing.assert_array_equal(becomes(params, mixer, mixer), logits(BEFORE, params))
    fewer = MixtureOfHeads(shared=2, active=1, gates="ones", **SHARED)
    assert np.abs(becomes(params, fewer) - logits(BEFORE, params)).max() > 1e-2


def test_linear_attention_copies_key_heads_and_layers_of_other_stages(params):
    linear = LinearAttention(heads=4, feature_map=Hedgehog(), positions=Rotary())
    after = chz.replace(BEFORE, stages=(Stage(pattern=(linear,)), Stage(pattern=(Attention(**SHARED),))))
    new, old = flatten(converted(params, BEFORE, after, 11)), flatten(params)
    for name in ("query", "output"):
        np.testing.assert_array_equal(
            new[f"stack.stages.0.0.mixer.{name}.kernel"][0], old[f"stack.stages.0.0.mixer.{name}.kernel"][0]
        )
    for name in ("key", "value"):
        heads = np.asarray(old[f"stack.stages.0.0.mixer.{name}.kernel"][0]).reshape(16, 2, 4)
        np.testing.assert_array_equal(
            new[f"stack.stages.0.0.mixer.{name}.kernel"][0].reshape(16, 4, 4), heads[:, [0, 0, 1, 1]]
        )
    np.testing.assert_array_equal(new["stack.stages.1.0.mlp.up.kernel"][0], old["stack.stages.0.0.mlp.up.kernel"][1])
    np.testing.assert_array_equal(new["stack.stages.0.0.mixer.key_features.kernel"][0, 3], np.eye(4))


def test_landmarks_begin_as_the_mean_of_the_embedding(params):
    after = chz.replace(BEFORE, stages=repeat(Landmark(block=4, **SHARED), depth=2), embedding_scale=3.0)
    new = converted(params, BEFORE, after, 11)
    np.testing.assert_allclose(new["landmark"], 3 * np.asarray(params["embedding"]).mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "mixer", "said"),
    [
        (Attention(bias=True, **SHARED), LinearAttention(heads=4), "layer 0: LinearAttention has no mixer.key.bias"),
        (
            Attention(**SHARED),
            SlidingWindow(heads=4, key_heads=1),
            r"layer 0: mixer.key.kernel is \(16, 8\), and \(16, 4\)",
        ),
        (Attention(**SHARED), SlidingWindow(head_dim=3, heads=4), "layer 0: mixer.key.kernel is"),
    ],
)
def test_what_has_no_place_is_refused(before, mixer, said):
    models = [LanguageModel(width=16, stages=repeat(each, depth=1)) for each in (before, mixer)]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), FunctionalModel(models[0], 11).abstract_params())
    with pytest.raises(UserError, match=said):
        converted(params, *models, 11)
    with pytest.raises(UserError, match="a model of 1 layers cannot become one of 2"):
        converted(params, models[0], BEFORE, 11)
