"""Every recurrent mixer against its paper's equation: whole modules, from input to output, beside a loop over tokens in
numpy that calls nothing of ours, in float64. `pytest -s` prints the table of errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.layers.first_values import holding
from recollect.layers.mixer import Place
from recollect.layers.recurrent import RecurrentMixer, StreamMixer
from recollect.pallas_kernels.dispatch import preferred_backend
from tests.layers.mixers.online_equations import (
    log_linear_gated_delta_net,
    log_linear_mamba2,
    mesa_net,
    titans,
    ttt_linear,
)
from tests.layers.mixers.paper_equations import (
    B,
    D,
    T,
    Weights,
    comba,
    delta_net,
    delta_product,
    gated_delta_net,
    gated_delta_net_2,
    gated_linear_attention,
    gated_slot_attention,
    hgrn,
    hgrn2,
    kimi_delta_attention,
    lightning,
    mamba2,
    min_gru,
    mlstm,
    retention,
    rg_lru,
    rwkv6,
    rwkv7,
    sigmoid,
)
from tests.layers.mixers.state_space_equations import STATE_SPACES, s4d

X = np.random.default_rng(0).normal(size=(B, T, D))

MODELS = {
    "DeltaNet": (layers.DeltaNet(heads=2), delta_net),
    "DeltaNet, gated, eigenvalues to -1": (
        layers.DeltaNet(heads=2, gate=True, negative_eigenvalues=True, kernel=None),
        delta_net,
    ),
    "Gated DeltaNet": (layers.GatedDeltaNet(heads=3), gated_delta_net),
    "Gated DeltaNet, values in groups, eigenvalues to -1": (
        layers.GatedDeltaNet(heads=6, key_heads=2, key_dim=5, value_dim=3, negative_eigenvalues=True),
        gated_delta_net,
    ),
    "Kimi Delta Attention": (layers.KimiDeltaAttention(heads=2), kimi_delta_attention),
    "Kimi Delta Attention, bounded": (layers.KimiDeltaAttention(heads=2, bound=5.0), kimi_delta_attention),
    "Gated DeltaNet 2": (layers.GatedDeltaNet2(heads=2, negative_eigenvalues=True), gated_delta_net_2),
    "DeltaProduct": (layers.DeltaProduct(heads=2, steps=3, negative_eigenvalues=True), delta_product),
    "DeltaProduct without decay": (layers.DeltaProduct(heads=2, decays=False), delta_product),
    "Comba": (layers.Comba(heads=2, correction=0.7), comba),
    "Mamba-2": (layers.Mamba2(heads=4, key_heads=2, key_dim=5), mamba2),
    "log-linear Mamba-2": (layers.LogLinearMamba2(heads=4, key_heads=2, key_dim=5, levels=6), log_linear_mamba2),
    "log-linear Gated DeltaNet": (
        layers.LogLinearGatedDeltaNet(heads=4, key_heads=2, levels=6),
        log_linear_gated_delta_net,
    ),
    "MesaNet": (layers.MesaNet(heads=2), mesa_net),
    "TTT-Linear": (layers.TTTLinear(heads=2, batch=4, positions=None), ttt_linear),
    "Titans, linear": (layers.Titans(heads=2, batch=4, rate=3.0), titans),
    "RetNet": (layers.Retention(heads=3, positions=None), retention),
    "GLA": (layers.GatedLinearAttention(heads=2, rank=3), gated_linear_attention),
    "HGRN2": (layers.HGRN2(heads=2), hgrn2),
    "Lightning (MiniMax-01)": (layers.Lightning(heads=4), lightning),
    "TransNormerLLM": (layers.Lightning(heads=4, form="transnormer"), lightning),
    "TransNormerLLM, the paper's decay": (layers.Lightning(heads=4, form="transnormer", decay="paper"), lightning),
    "mLSTM": (layers.MLSTM(heads=2), mlstm),
    "RWKV-6": (layers.RWKV6(heads=2, mix_rank=3, decay_rank=4), rwkv6),
    "GSA": (layers.GatedSlotAttention(heads=2, slots=5), gated_slot_attention),
    "HGRN": (layers.HGRN(), hgrn),
    "minGRU": (layers.MinGRU(expansion=2.0), min_gru),
    "RG-LRU (Griffin)": (layers.RGLRU(heads=3), rg_lru),
    "RWKV-7": (layers.RWKV7(heads=2, rank=5), rwkv7),
    **STATE_SPACES,
}


def built(config):
    """The module in float64, with weights away from their initial values."""
    module = config.build(D, Place(1, 3), nnx.Rngs(params=jax.random.key(1)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


def outputs(weights, x, config, equation):
    """S4D gates what its last projection returns; the others end with it."""
    y = equation(weights, x, config)
    out = weights.linear("output", y)
    return out * sigmoid(weights.linear("gate", y)) if equation is s4d else out


@pytest.mark.parametrize("name", MODELS)
def test_the_mixer_is_its_papers_equation(name):
    config, equation = MODELS[name]
    weights, expected, error = compared(config, equation)
    print(f"\n| {name:<52} | {error:.1e} |", end="")
    assert error < 1e-10
    changed = outputs(weights, np.where(np.arange(T)[:, None] == 3, 2 * X, X), config, equation)
    assert np.abs(changed - expected)[:, 4:].max() > 1e-3, "later outputs must depend on what was stored"


def compared(config, equation):
    """Weights, what the equation gives, and how far the module is off."""
    module = built(config)
    weights = Weights(module)
    expected = outputs(weights, X, config, equation)
    with jax.enable_x64(True), preferred_backend("reference"):
        result = np.asarray(module(jnp.asarray(X, jnp.float64)).hidden)
    assert result.dtype == np.float64
    return weights, expected, np.abs(result - expected).max() / np.sqrt((expected**2).mean())


def test_rwkv7_mixes_in_the_values_of_the_first_layer():
    first, later = (built(layers.RWKV7(heads=2, rank=5, value_residual=mixes)) for mixes in (False, True))
    before = np.concatenate([np.zeros_like(X[:, :1]), X[:, :-1]], axis=1)
    weights = Weights(first)
    values = weights.linear("value", X + (before - X) * weights["mixes.v.mix"])
    with jax.enable_x64(True), preferred_backend("reference"), holding(None) as held:
        first(jnp.asarray(X, jnp.float64))
        result = np.asarray(later(jnp.asarray(2 * X, jnp.float64)).hidden)
    weights = Weights(later)
    expected, without = (weights.linear("output", rwkv7(weights, 2 * X, later.config, v)) for v in (values, None))
    scale = np.sqrt((expected**2).mean())
    assert np.abs(np.asarray(held.values) - values).max() < 1e-10
    assert np.abs(result - expected).max() / scale < 1e-10
    assert np.abs(without - expected).max() / scale > 0.1


def test_ttt_linear_counts_positions_in_mini_batches():
    assert compared(layers.TTTLinear(heads=2, batch=4), ttt_linear)[2] < 1e-5  # angles are fp32


def test_every_recurrent_mixer_is_here():
    modules = [config.build(D, Place(0, 1), nnx.Rngs(params=jax.random.key(0))) for config, _ in MODELS.values()]
    recurrent = {value for value in vars(layers).values() if isinstance(value, type) and issubclass(value, StreamMixer)}
    bases = {
        StreamMixer,
        RecurrentMixer,
        layers.DeltaRuleMixer,
        layers.LinearAttentionMixer,
    }  # test_linear_attention.py has its own
    assert {type(module) for module in modules} == recurrent - bases
