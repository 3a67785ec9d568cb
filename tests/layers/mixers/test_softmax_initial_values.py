"""First values of softmax mixers' parameters beside the published ones: bounds, mean and spread over many draws."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

from recollect import layers
from recollect.layers.mixer import Place
from recollect.layers.modules import LearnedPositions, LightningIndexer
from tests.layers.mixers.test_recurrent_initial_values import (
    PROJECTIONS,
    D,
    check_first_values,
    constant,
    linear,
    normal,
    output,
    uniform,
)

BIASES = {f"{name}.bias": lambda values: constant(values, 0) for name in ("query", "key", "value", "output")}
NORMS = {f"{name}.gain": lambda values: constant(values, 1) for name in ("query_norm", "key_norm")}
ROUTERS = {f"{name}_router.kernel": linear for name in ("routed", "shared", "kind")}


def conv_taps(kernel):
    """torch's Conv1d, depthwise."""
    return lambda values: uniform(values, -(kernel**-0.5), kernel**-0.5)


def zero(values):
    constant(values, 0)


LATENT = {
    **{f"{name}.kernel": linear for name in ("down", "shared_key", "key_up", "value_up", "query_down", "query")},
    **{f"{name}.gain": lambda values: constant(values, 1) for name in ("norm", "query_norm")},
    "output.kernel": output,
}
INDEXER = {
    **{f"selector.{name}.kernel": linear for name in ("query", "key", "head_weights")},
    "selector.norm.gain": lambda values: constant(values, 1),
    "selector.norm.bias": zero,
}

PUBLISHED = {
    # GPT-2's N(0, 0.02), outputs over sqrt(2 layers).
    layers.Attention(bias=True, query_key_norm=True): PROJECTIONS | BIASES | NORMS,
    layers.Attention(heads=2, positions=LearnedPositions(maximum=7)): PROJECTIONS | {"positions.table": linear},
    layers.SlidingWindow(heads=2, sinks="learned"): PROJECTIONS | {"sinks": zero},
    layers.GatedAttention(): PROJECTIONS | {"gate.projection.kernel": linear},
    layers.DifferentialAttention(heads=2): PROJECTIONS
    | {
        "vectors": lambda values: normal(values, 0.1),
        "start": lambda values: constant(values, 0.8 - 0.6 * 2.718281828**-0.3),
        "norm.gain": lambda values: constant(values, 1),
    },
    layers.ForgettingAttention(): PROJECTIONS | {"forget.kernel": linear, "forget.bias": zero},
    layers.LatentAttention(rank=12, query_rank=10): LATENT,
    layers.RelativeConvolutionalAttention(heads=2, maximum=9): PROJECTIONS
    | {f"{name}.convolution.taps": conv_taps(3) for name in ("query", "key", "value")}
    | {f"{name}.convolution.bias": conv_taps(3) for name in ("query", "key", "value")}
    | {"value.bias": zero, "output.bias": zero, "content": zero, "by_distance": zero, "of_distance": zero},
    layers.PathAttention(rank=8): PROJECTIONS
    | {"down.kernel": linear, "direction.kernel": linear, "direction.convolution.taps": conv_taps(3)}
    | {"strength.kernel": linear, "strength.bias": zero},
    layers.BlockSelection(heads=2): PROJECTIONS,
    layers.BlockSelection(heads=2, retrieve=LightningIndexer()): PROJECTIONS | INDEXER,
    layers.NativeSparseAttention(heads=4): PROJECTIONS
    | {"gate.kernel": linear}
    | {f"compress_{name}.places": zero for name in ("key", "value")}
    | {f"compress_{name}.up.kernel": lambda values: normal(values, (8 * 12) ** -0.5) for name in ("key", "value")}
    | {f"compress_{name}.down.kernel": lambda values: normal(values, 12**-0.5) for name in ("key", "value")},
    layers.SparseLatentAttention(rank=12, query_rank=10): LATENT | INDEXER,
    layers.SelectiveAttention(): PROJECTIONS | {"selector.kernel": linear},
    layers.SelectiveAttention(select="repeats"): PROJECTIONS,
    layers.Landmark(heads=2): PROJECTIONS,
    layers.PlannedAttention(): PROJECTIONS,
    layers.PositionInvariantAttention(): PROJECTIONS,
    layers.InjectedAttention(): PROJECTIONS
    | {"inner.kernel": linear, "outer.kernel": linear, "norm.gain": lambda values: constant(values, 1)},
    layers.MixtureOfHeads(): PROJECTIONS | ROUTERS,
    layers.MixtureOfHeads(gates="ones"): PROJECTIONS,
}


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: type(config).__name__)
def test_first_values_are_the_published_ones(config):
    check_first_values(config, PUBLISHED[config])


def test_every_softmax_mixer_is_here():
    softmax = {cls for cls in layers.MIXERS if issubclass(cls, layers.SoftmaxConfig)} | {
        layers.LatentAttention,
        layers.SparseLatentAttention,
    }
    assert {type(config) for config in PUBLISHED} == softmax


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: type(config).__name__)
def test_inputs_of_another_width_are_refused(config):
    with pytest.raises(ValueError, match=rf"it must be \(batch, tokens, {D}\)"):
        built(config)(jnp.zeros((1, 3, D + 1)))


def built(config):
    return config.build(D, Place(1, 4), nnx.Rngs(params=0))
