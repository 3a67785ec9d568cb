"""Whole published patterns: their layers, and TransNormerLLM against its equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.experiments.pretrain import variant
from recollect.experiments.pretrain_hybrids import transnormer
from recollect.experiments.pretrain_sizes import BasedLayers, Size

TINY = Size(256, 2, 3, 192, BasedLayers(256, 2, 3, {"c": 1}))
ORDERS = {
    "samba": ("Mamba SlidingWindow ", 22),
    "griffin": ("RGLRU RGLRU SlidingWindow ", 24),
    "jamba": ("Mamba Mamba Mamba Mamba Attention Mamba Mamba Mamba ", 21),
    "qwen3_next": ("GatedDeltaNet GatedDeltaNet GatedDeltaNet GatedAttention ", 24),
    "kimi_linear": ("KimiDeltaAttention KimiDeltaAttention KimiDeltaAttention LatentAttention ", 24),
    "minimax_01": (7 * "Lightning " + "Attention ", 24),
    "striped_hyena_2": ("Hyena2 Hyena2 Hyena2 Attention Hyena2 Hyena2 Hyena2 ", 24),
    "transnormer": ("Lightning ", 24),
}


@pytest.mark.parametrize("pattern", ORDERS)
def test_layers_stand_in_the_published_order(pattern):
    order, depth = ORDERS[pattern]
    kinds = [type(mixer).__name__ for mixer in variant(f"{pattern}_360m").model.mixers]
    assert kinds == (order.split() * depth)[:depth]


def test_filters_of_striped_hyena_take_turns_as_in_evo_2():
    mixers = variant("striped_hyena_2_360m").model.mixers
    kinds = [getattr(mixer, "filter", "attention") for mixer in mixers]
    layers = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in ("SE", "MR", "LI", "attention")}
    assert layers["SE"][:6] == [0, 4, 7, 11, 14, 18] and layers["MR"][:6] == [1, 5, 8, 12, 15, 19]
    assert layers["LI"][:6] == [2, 6, 9, 13, 16, 20] and layers["attention"] == [3, 10, 17]


def value(parameter):
    return np.asarray(parameter[...], np.float64)


def normed(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def by_equations(model, tokens, decay):
    """TransNormerLLM of heads of 128 dimensions, token by token; parameters are read from `model`."""
    embedding, t, heads, depth = value(model.embedding), len(tokens), 2, 3
    x = embedding[tokens] * 16  # the root of the width
    for layer, block in enumerate(model.stack.layers()):
        mixer, mlp, h = block.mixer, block.mlp, normed(x)
        q, k, v, u = (
            (h @ value(linear.kernel)).reshape(t, heads, 128)
            for linear in (mixer.query, mixer.key, mixer.value, mixer.gate.projection)
        )
        q, k = silu(q), silu(k)
        if layer == 0:
            angles = np.arange(t)[:, None, None] * value(mixer.positions.theta)
            q, k = (np.concatenate([y * np.cos(angles), y * np.sin(angles)], axis=-1) for y in (q, k))
        out = np.zeros_like(v)
        for head in range(heads):
            if decay == "code":
                rate = 2 ** (-8 * (head + 1) / heads) * (1 - layer / (depth - 1) + 1e-5)
            else:
                rate = 8 * head / heads * (1 - layer / depth)
            for i in range(t):
                for j in range(i + 1):
                    out[i, head] += np.exp(-rate * (i - j)) * (q[i, head] @ k[j, head]) * v[j, head]
        x = x + (u.reshape(t, -1) * normed(out.reshape(t, -1))) @ value(mixer.output.kernel)
        h = normed(x)
        x = x + ((h @ value(mlp.gate.kernel)) * (h @ value(mlp.up.kernel))) @ value(mlp.down.kernel)
    return normed(x) @ embedding.T


@pytest.mark.more
@pytest.mark.parametrize("decay", ["code", "paper"])
def test_transnormer_is_its_equations(decay):
    config = transnormer(TINY, decay)
    model = config.build(11, nnx.Rngs(params=0))
    graph, state = nnx.split(model)
    larger = jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 5 * leaf, state)  # so that layers matter
    model = nnx.merge(graph, larger)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    expected = by_equations(model, np.asarray(tokens[0]), decay)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model(tokens)[0], expected, rtol=2e-3, atol=2e-3 * np.std(expected))
        first, streamed = model.extend(tokens[:, :4], model.init_state(1, 9))
        rest, _ = model.extend(tokens[:, 4:], streamed)
        logits = model.logits(jnp.concatenate([first, rest], axis=1))[0]
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3 * np.std(expected))
