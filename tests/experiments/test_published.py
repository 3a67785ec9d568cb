"""What published experiments of recall set beside their mixers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.experiments import based, pretrain, zoology
from recollect.layers import Attention, BaseConvolution, Hyena, LinearAttention, SlidingWindow
from recollect.layers.modules import LayerNorm, PassThrough
from recollect.models import LanguageModel, activations, repeat


def test_a_block_adds_its_second_norm_to_the_stream():
    config = LanguageModel(width=8, stages=repeat(Attention(), depth=1), norm=LayerNorm(), mlp=PassThrough())
    model = config.build(5, nnx.Rngs(params=0))
    parts = dict(activations(model, jnp.asarray([[1, 2, 3]])))
    stream = np.asarray(parts["embedding"] + parts["layer 0 Attention mixer"], np.float64)
    centred = stream - stream.mean(axis=-1, keepdims=True)
    second = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(parts["layer 0 Attention mlp"], second, atol=1e-5)
    gains = {path for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model)) if "mlp_norm" in str(path)}
    assert len(gains) == 2  # a gain and a bias, trained
    with pytest.raises(UserError, match="neither hidden units nor biases"):
        PassThrough(hidden=3)


def test_recall_models_are_the_published_ones():
    figures = (zoology.figure2(), zoology.figure2_small(), based.figure2(), based.figure2_small())
    experiments = [zoology.cell(), zoology.attention(), *(one for study in figures for one in study.experiments)]
    assert all(isinstance(one.model.mlp, PassThrough) for one in experiments)
    mixers = {f"{one.task} {one.name}".strip(): one.model.mixers for one in experiments}
    assert all(mixer.bias for one in mixers.values() for mixer in one if isinstance(mixer, Attention | SlidingWindow))
    for window in (8, 1024):
        first, second = mixers[f"based.window_{window}"]
        assert isinstance(first, BaseConvolution) and second.window == window + 1
    for name in ("based.hyena_d64", "64x4 hyena_d64"):
        assert len(mixers[name]) == 2
        for mixer in mixers[name]:
            assert isinstance(mixer, Hyena) and mixer.time == "last" and mixer.trains_times
    assert mixers["64x4 base_convolution_d64"][1].time == "last"


def test_based_language_models_have_the_published_epsilons():
    model = pretrain.variant("based_360m").model
    assert model.norm.epsilon == 1e-5
    assert {mixer.epsilon for mixer in model.mixers if isinstance(mixer, LinearAttention)} == {1e-12}
