"""Mixture of heads: gates, choices, the balance loss, and plain attention as the limit."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, MixerOutput
from recollect.layers.mixers import mixture_of_heads
from recollect.layers.mixers.attention import Attention
from recollect.layers.mixers.mixture_of_heads import MixtureOfHeads
from recollect.layers.modules.positions import Rotary
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.pallas_kernels.head_mixture_attention import skips
from tests.layers.mixers.test_attention import (
    ROW,
    assert_documents_stand_alone,
    assert_streams,
    build,
    error,
    full,
    tokens,
    whole,
)

ROUTERS = ("routed_router", "shared_router", "kind_router")


route = jax.jit(lambda mixer, x: mixer.route(x, mixer._project(x, None, Context())[0]))


def with_uniform_routers(mixer):
    for name in ROUTERS:
        router = getattr(mixer, name)
        if router is not None:
            router.kernel[...] = jnp.zeros_like(router.kernel[...])
    return mixer


@pytest.mark.parametrize(("shared", "active"), [(2, 2), (1, 3), (0, 4), (4, 0)])
def test_all_heads_active_under_uniform_routers_is_attention(shared, active):
    mixer = with_uniform_routers(build(MixtureOfHeads(heads=4, shared=shared, active=active)))
    plain = build(Attention(heads=4))
    plain.query, plain.key, plain.value, plain.output = mixer.query, mixer.key, mixer.value, mixer.output
    x = tokens(2, 20)
    assert error(full(mixer, x), full(plain, x)) < 1e-6


@pytest.mark.parametrize("gates", ["paper", "code"])
@pytest.mark.parametrize(("shared", "active"), [(2, 3), (1, 2), (0, 2), (8, 0)])
def test_gates_follow_the_equations(gates, shared, active):
    mixer = build(MixtureOfHeads(heads=8, shared=shared, active=active, gates=gates))
    x = tokens(2, 11)
    found, probabilities, chosen = (np.asarray(y, np.float64) for y in route(mixer, x))

    def softmax(router):
        return np.asarray(jax.nn.softmax(x @ router.kernel[...], axis=-1), np.float64)

    a = softmax(mixer.kind_router) if 0 < shared < 8 else np.ones((2, 11, 2))
    s = softmax(mixer.shared_router) if shared > 1 else np.ones((2, 11, shared))
    expected = np.zeros((2, 11, 8))
    expected[..., :shared] = a[..., :1] * s
    if active:
        p = softmax(mixer.routed_router)
        assert error(probabilities, p) < 1e-6
        for row in range(2):
            for t in range(11):
                top = np.argsort(-p[row, t])[:active]
                assert set(np.flatnonzero(chosen[row, t])) == set(top)
                weight = p[row, t, top] if gates == "paper" else active * p[row, t, top] / p[row, t, top].sum()
                expected[row, t, shared + top] = a[row, t, 1] * weight
    if gates == "code":
        kinds = 2 if 0 < shared < 8 else 1
        expected *= kinds
        expected[..., :shared] *= shared
        # Each part's gates average 1 over its active heads, up to a.
        assert (
            error(
                found.sum(-1), kinds * (a[..., 0] * shared + a[..., 1] * active) if active else np.full((2, 11), shared)
            )
            < 1e-6
        )
    assert error(found, expected) < 1e-6
    absent = [getattr(mixer, name) is None for name in ROUTERS]
    assert absent == [active == 0, shared < 2, not (shared and active)]


@pytest.mark.parametrize("positions", [None, Rotary()])
def test_gates_of_one_by_the_norm_of_queries(positions):
    """MoH-LLaMA3 against a loop over tokens in float64: heads that count do so wholly, and no router has weights."""
    mixer = build(MixtureOfHeads(heads=4, shared=1, active=2, gates="ones", positions=positions))
    assert all(getattr(mixer, name) is None for name in ROUTERS)
    x = tokens(1, 9)
    gates, probabilities, chosen = route(mixer, x)
    q = (np.asarray(x[0], np.float64) @ np.asarray(mixer.query.kernel[...], np.float64)).reshape(9, 4, 4)
    norms = np.sqrt((q[:, 1:] ** 2).sum(-1))
    weights = np.exp(norms / norms.std(-1, ddof=1, keepdims=True))
    assert error(probabilities[0], weights / weights.sum(-1, keepdims=True)) < 1e-5
    picked = np.argsort(np.argsort(-norms, axis=-1), axis=-1) < 2
    np.testing.assert_array_equal(chosen[0], picked)
    np.testing.assert_array_equal(gates[0], np.concatenate([np.ones((9, 1)), picked], axis=1))
    # Plain attention with the outputs of the other heads left out.
    plain = build(Attention(heads=4, positions=positions))
    plain.query, plain.key, plain.value, plain.output = mixer.query, mixer.key, mixer.value, mixer.output
    kept = {}
    plain._finish = lambda o, x: kept.update(o=o) or MixerOutput(o)
    plain(x)
    o = np.where(np.asarray(gates)[..., None] == 1, kept["o"], 0).reshape(1, 9, 16)
    assert error(full(mixer, x), o @ np.asarray(mixer.output.kernel[...])) < 1e-6


def test_gates_of_one_pass_gradients_to_the_queries():
    mixer = build(MixtureOfHeads(heads=4, shared=1, active=2, gates="ones", balance_weight=0.0))
    x = tokens(1, 1)  # one token attends to itself alone: its scores have no gradient, its gates do
    graph, weights = nnx.split(mixer)
    gradient = jax.grad(lambda weights: jnp.sum(nnx.merge(graph, weights)(x).hidden))(weights)
    of_queries = np.asarray(gradient["query"]["kernel"][...]).reshape(16, 4, 4)
    assert not of_queries[:, 0].any() and of_queries[:, 1:].any() and np.isfinite(of_queries).all()


def test_ties_still_pick_exactly_so_many():
    mixer = with_uniform_routers(build(MixtureOfHeads(heads=8, shared=2, active=3)))
    _, _, chosen = route(mixer, tokens(2, 5))
    assert np.all(np.asarray(chosen).sum(-1) == 3)


def test_heads_not_picked_do_not_count():
    mixer = build(MixtureOfHeads(heads=8, shared=2, active=3))
    x = tokens(1, 6)
    gates, _, chosen = route(mixer, x)
    assert np.array_equal(np.asarray(gates[..., 2:]) > 0, chosen)
    # The values of one routed head blown up: exactly the tokens that picked it change.
    before = full(mixer, x)
    mixer.value.kernel[...] = mixer.value.kernel[...].at[:, 2 * 5 : 2 * 6].mul(100)
    changed = np.any(np.asarray(full(mixer, x) != before), axis=-1)
    assert np.array_equal(changed, chosen[..., 3])
    assert 0 < changed.sum() < 6


@pytest.mark.parametrize(("balance", "expected"), [("paper", 3 / 6), ("code", 3.0)])
def test_balance_loss_under_uniform_routing(balance, expected):
    """Sum of P_i f_i is K / (h - h_s) whoever is picked, as P is uniform; the code's scale makes it K."""
    config = MixtureOfHeads(heads=8, shared=2, active=3, balance=balance, balance_weight=0.1)
    out = whole(with_uniform_routers(build(config)), tokens(2, 9))
    assert np.isclose(out.losses["head_balance"], 0.1 * expected, rtol=1e-6)
    assert out.hidden.shape == (2, 9, 16) and out.losses["head_balance"].dtype == jnp.float32


def test_balance_loss_and_shares_by_count_without_padding():
    config = MixtureOfHeads(heads=8, shared=2, active=3, balance_weight=1.0)
    mixer, segments = build(config), jnp.array([ROW])
    x = jnp.where(segments[..., None] != 0, tokens(1, len(ROW)), jnp.nan)
    _, probabilities, chosen = (np.asarray(y)[0, np.array(ROW) != 0] for y in route(mixer, x))
    shares = chosen.mean(0)
    for balance, scale in (("paper", 1), ("code", 6)):
        out = whole(rescaled(mixer, config, balance), x, Context(segments=segments))
        assert np.isclose(out.losses["head_balance"], scale * (probabilities.mean(0) * shares).sum(), rtol=1e-5)
    assert np.isclose(out.metrics["head_share_min"], shares.min()) and np.isclose(
        out.metrics["head_share_max"], shares.max()
    )
    assert np.isclose(out.metrics["active_heads"], 5 / 8)
    nothing = whole(mixer, x, Context(segments=jnp.zeros_like(segments)))
    assert nothing.losses["head_balance"] == 0


def rescaled(mixer, config, balance):
    """The same parameters under another balance scale."""
    other = build(chz.replace(config, balance=balance))
    assert error(other.routed_router.kernel[...], mixer.routed_router.kernel[...]) == 0
    return other


def test_the_loss_pulls_probability_from_crowded_heads():
    mixer, x = build(MixtureOfHeads(heads=4, shared=1, active=1, balance_weight=1.0)), tokens(4, 16)

    def loss(mixer):
        return mixer(x).losses["head_balance"]

    gradient = jax.jit(jax.grad(loss))(mixer)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((gradient.query, gradient.value, gradient.kind_router)))
    # By the gradient through P alone: sum_i f_i dP_i.
    _, _, chosen = route(mixer, x)
    shares = jnp.mean(chosen, axis=(0, 1))
    expected = jax.grad(lambda kernel: jnp.sum(shares * jnp.mean(jax.nn.softmax(x @ kernel), axis=(0, 1))))(
        mixer.routed_router.kernel[...]
    )
    assert error(gradient.routed_router.kernel[...], expected) < 1e-5


def test_the_output_trains_every_router():
    mixer, x = build(MixtureOfHeads(heads=8, shared=2, active=3, balance_weight=0.0)), tokens(2, 9)
    gradient = jax.jit(jax.grad(lambda mixer: jnp.sum(mixer(x).hidden ** 2)))(mixer)
    for name in ROUTERS:
        assert np.max(np.abs(getattr(gradient, name).kernel[...])) > 1e-4, name


def test_routers_run_in_full_precision():
    mixer, x = build(MixtureOfHeads(heads=8, shared=2, active=3)), tokens(2, 9).astype(jnp.bfloat16)
    gates, probabilities, _ = route(mixer, x)
    assert gates.dtype == probabilities.dtype == jnp.float32
    exact, _, _ = route(mixer, x.astype(jnp.float32))
    assert error(gates, exact) == 0
    assert full(mixer, x).dtype == jnp.bfloat16


def test_documents_stand_alone():
    assert_documents_stand_alone(MixtureOfHeads(heads=4, shared=2, active=1))


def test_streams():
    assert_streams(MixtureOfHeads(heads=4, key_heads=2, shared=1, active=2, gates="paper"))


def test_without_routed_heads_there_is_no_loss():
    out = build(MixtureOfHeads(heads=4, shared=4, active=0))(tokens(1, 3))
    assert out.losses == {} and list(out.metrics) == ["active_heads"] and out.metrics["active_heads"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": 9}, "shared=9"),
        ({"active": 7}, "active=7: must be from 1 to the 6"),
        ({"active": 0}, "active=0: must be from 1 to the 6"),
        ({"shared": 8}, "active=3: must be 0"),
        ({"balance_weight": -1.0}, "balance_weight=-1.0"),
        ({"heads": 0}, "heads=0"),
    ],
)
def test_impossible_configs_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        MixtureOfHeads(**fields)


def long(config, t=300):
    """A mixer whose weights are large enough that every head matters, and a long input."""
    mixer = build(config)
    graph, weights = nnx.split(mixer)
    weights = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), weights)
    assert skips(t, t, config.routed, config.active, self_attention=True)
    return graph, weights, tokens(2, t)


def both(graph, weights, x, context, skip, monkeypatch):
    """Output, losses, metrics, and gradients by weights and input, by the gathered form or by all heads."""
    monkeypatch.setattr(mixture_of_heads, "skips", lambda *sizes, **more: skip)

    def run(weights, x):
        out = nnx.merge(graph, weights)(x, context)
        hidden = (
            out.hidden if context.segments is None else jnp.where((context.segments != 0)[..., None], out.hidden, 0)
        )
        return jnp.sum(jnp.sin(hidden)) + sum(out.losses.values()), (hidden, out.losses, out.metrics)

    gradients, outputs = jax.jit(jax.grad(run, (0, 1), has_aux=True))(weights, x)
    return outputs, gradients


@pytest.mark.parametrize(
    "config",
    [
        # A key head that the last shared and the first routed heads share.
        MixtureOfHeads(heads=6, key_heads=2, shared=2, active=2, gates="paper", head_dim=8, positions=Rotary()),
        pytest.param(MixtureOfHeads(heads=4, shared=0, active=2, head_dim=8, balance="code"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gathered_heads_are_the_dense_layer(config, packed, monkeypatch):
    graph, weights, x = long(config)
    segments = (
        jnp.sort(jax.random.randint(jax.random.key(0), (2, 300), 1, 4), axis=1).at[0, :5].set(0).at[1, 280:].set(0)
    )
    context = Context(segments=segments if packed else None)
    found = both(graph, weights, x, context, True, monkeypatch)
    expected = both(graph, weights, x, context, False, monkeypatch)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(a, b) < 1e-4


@pytest.mark.slow
def test_gathered_heads_are_causal():
    """Past outputs keep all but their last bits, whatever later tokens choose."""
    config = MixtureOfHeads(heads=4, shared=1, active=1, head_dim=8)
    graph, weights, x = long(config)
    run = jax.jit(lambda x: nnx.merge(graph, weights)(x).hidden)
    before, after = run(x), run(x.at[:, 200:].add(1.0))
    assert error(after[:, :200], before[:, :200]) < 1e-5 and error(after[:, 200:], before[:, 200:]) > 0.01
    assert not config.traits.exact_causality and MixtureOfHeads(heads=4, shared=1, active=3).traits.exact_causality


@pytest.mark.slow
def test_a_stack_of_gathered_layers_trains_under_scan_and_vmap():
    model = FunctionalModel(
        LanguageModel(width=16, stages=repeat(MixtureOfHeads(heads=4, shared=1, active=1, head_dim=8), depth=2)), 24
    )
    params = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 2))
    text = jax.random.randint(jax.random.key(1), (2, 1, 260), 0, 24)
    grad_fn = jax.grad(lambda params, text: jnp.mean(jnp.square(model.bind(params)(text))))
    together = jax.jit(jax.vmap(grad_fn))(params, text)
    alone = jax.jit(grad_fn)(jax.tree.map(lambda leaf: leaf[1], params), text[1])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert np.max(np.abs(a[1] - b)) <= 1e-5 * max(float(np.max(np.abs(b))), 1e-6)


@pytest.mark.slow
def test_half_of_the_routed_heads_take_less_work():
    """FLOPs of the training step of one layer at 1,024 tokens, by XLA's count, gathered against dense; times: `main.py
    bench head-mixture`.

    Two of eight heads are dense in both, the other six take 0.63 of the scores (half, and what tiles add); projections
    and copies come on top.
    """

    def flops(skip):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixture_of_heads, "skips", lambda *sizes, **more: skip)
            mixer = build(MixtureOfHeads(heads=8, shared=2, active=3, head_dim=32))
            graph, weights = nnx.split(mixer)
            grad_fn = jax.jit(jax.grad(lambda weights, x: jnp.sum(nnx.merge(graph, weights)(x).hidden)))
            return grad_fn.lower(weights, tokens(1, 1024)).cost_analysis()["flops"]

    assert flops(True) < 0.8 * flops(False)
