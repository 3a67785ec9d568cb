"""A batch in pieces against the whole batch: gradients, losses and metrics, with pieces of different numbers of tokens
and pieces of padding alone."""

import functools
from pathlib import Path

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.data.batch import Batch
from recollect.layers.mixer import Context, Mixer, MixerConfig, MixerOutput, Place
from recollect.layers.modules.positions import Rotary
from recollect.layers.token_sums import LayerSums, Means
from recollect.models import LanguageModel, Stage, repeat
from recollect.training.loss import Loss
from recollect.training.step import Program
from tests.training.tiny import tiny

ROUTED = layers.MixtureOfHeads(heads=4, shared=1, active=1, positions=Rotary(), balance_weight=1.0)
MIXERS = {
    "paper": ROUTED,
    "code": chz.replace(ROUTED, shared=0, active=2, gates="paper", balance="code"),
    "all shared": layers.MixtureOfHeads(heads=2, shared=2, active=0),
    "selective": layers.SelectiveAttention(),
    "latent": layers.SparseLatentAttention(),
}
"""Every mixer that has auxiliary losses or metrics."""


@chz.chz(typecheck=True)
class MeanProbe(MixerConfig):
    """Adds nothing; a loss and a metric that are means over tokens, given as scalars as any mixer may."""

    def build(self, width, place, rngs):
        return MeanProbeMixer()


class MeanProbeMixer(Mixer):
    def __call__(self, x, context=Context()):
        real = context.segments != 0
        mean = jnp.sum(jnp.where(real, jnp.mean(x**2, axis=-1), 0)) / jnp.maximum(jnp.sum(real), 1)
        return MixerOutput(jnp.zeros_like(x), {"size": 0.1 * mean}, {"mean_square": mean})


def batch() -> Batch:
    """Eight rows of 12 tokens: a full one, shorter ones, and four of padding alone."""
    rng = np.random.default_rng(0)
    lengths = np.array([12, 9, 5, 1, 0, 0, 0, 0])
    segments = (np.arange(12) < lengths[:, None]).astype(np.int32)
    tokens, targets = rng.integers(0, 32, (2, 8, 12)).astype(np.int32)
    # Rows differ in which heads their tokens choose, or every piece would be balanced like the whole.
    tokens[1:4] %= 3
    return Batch(tokens, targets, None, (segments * rng.uniform(0.5, 2, segments.shape)).astype(np.float32), segments)


def program_of(stages, pieces):
    experiment = tiny(Path("never written"), batch_size=8, accumulate=pieces)
    return Program(chz.replace(experiment, model=LanguageModel(width=16, stages=stages), loss=Loss(z_loss=1e-2)))


@functools.cache
def found(stages, pieces):
    program = program_of(stages, pieces)
    params = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), program.model.abstract_params()
    )
    return jax.jit(program.gradients)(params, batch(), None)


def assert_same(stages, pieces):
    (gradients, metrics), (expected, expected_metrics) = (found(stages, count) for count in (pieces, 1))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(expected_metrics[name]), rel=1e-6), name
    norm, size = (
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(of)))
        for of in (expected, gradients)
    )
    assert size == pytest.approx(norm, rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.sqrt(np.sum(np.square(np.asarray(a, np.float64) - b))) < 1e-6 * norm
    return metrics


@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_equal_the_whole(mixer):
    """In four pieces: of 21, 6, 0 and 0 tokens."""
    metrics = assert_same(repeat(MIXERS[mixer], depth=1), 4)
    assert {"loss", "accuracy", "z_loss"} < metrics.keys()
    routed = isinstance(MIXERS[mixer], layers.MixtureOfHeads)
    assert ("active_heads" in metrics) == routed and ("head_balance" in metrics) == (routed and mixer != "all shared")


@pytest.mark.parametrize("pieces", [2, 8])
def test_pieces_equal_the_whole_over_depth(pieces):
    """Scanned and single layers, several with a loss of the same name, one with means over tokens."""
    stages = (Stage(pattern=(ROUTED, layers.Attention(heads=2)), repeats=2), *repeat(MeanProbe(), ROUTED, depth=2))
    metrics = assert_same(stages, pieces)
    assert {"head_balance", "size", "mean_square", "head_share_min", "head_share_max"} <= metrics.keys()


def test_pieces_of_padding_do_not_count():
    """The batch with its four rows of padding, and without them."""
    program = program_of(repeat(ROUTED, depth=1), 4)
    params = jax.jit(program.model.init)(jax.random.key(0))
    gradients = jax.jit(program.gradients)
    _, padded = gradients(params, batch(), None)
    _, alone = gradients(params, jax.tree.map(lambda leaf: leaf[:4], batch()), None)
    for name, value in padded.items():
        assert float(value) == pytest.approx(float(alone[name]), rel=1e-6), name


def test_every_mixer_with_losses_or_metrics_is_here():
    x, reporting = jnp.ones((1, 4, 16)), set()
    for config in layers.MIXERS:
        mixer = config().build(16, Place(), nnx.Rngs(params=jax.random.key(0)))
        out = jax.eval_shape(mixer, x)
        if out.losses or out.metrics:
            reporting.add(config)
    assert reporting == {type(config) for config in MIXERS.values()}


def test_sums_of_layers_are_their_means():
    """Over the layers that have a name; no token at all is 0, not NaN."""
    two = jax.vmap(lambda a: Means.of({"a": a}, {}, jnp.float32(2)))(jnp.array([1.0, 3.0]))
    one = jax.vmap(lambda a: Means.of({"a": a, "b": a - 3}, {"m": a / 16}, jnp.float32(4)))(jnp.array([8.0]))
    losses, metrics = LayerSums((two, one)).formed()
    assert {name: float(value) for name, value in {**losses, **metrics}.items()} == {"a": 4.0, "b": 5.0, "m": 0.5}
    assert float(Means.of({"a": jnp.float32(0)}, {}, jnp.float32(0)).formed()[0]["a"]) == 0
