"""Each mixer of the softmax family against loops over queries and keys written from its paper's equation, in float64;
initial values; settings that cannot be."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers.mixer import Context, Place
from recollect.layers.modules import LightningIndexer, MeanBlocks, Rotary

T, WIDTH = 11, 16
X = np.random.default_rng(0).normal(size=(1, T, WIDTH))
CLOSE = 1e-5


def built(config, layer=2):
    """The module with every parameter moved away from its start, in float64 as nested attributes."""
    module = config.build(WIDTH, Place(layer, 4), nnx.Rngs(params=jax.random.key(1)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


def w(parameter):
    return np.asarray(parameter[...], np.float64)


def linear(module, x):
    return x @ w(module.kernel) + (0 if module.bias is None else w(module.bias))


def heads(module, x, n):
    return linear(module, x).reshape(T, n, -1)


def rms(x, gain, epsilon=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * gain


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def attended(score, values):
    """Sums over keys up to each query: score(i, j) -> number, values (T, v)."""
    out = np.zeros((T, values.shape[-1]))
    for i in range(T):
        weights = softmax(np.array([score(i, j) for j in range(i + 1)]))
        out[i] = weights @ values[: i + 1]
    return out


def assert_equal(module, expected):
    out = np.asarray(module(jnp.asarray(X, jnp.float32)).hidden[0], np.float64)
    assert np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)) < CLOSE


def turned(x, i, base=10_000.0):
    """x (k,) as k/2 pairs (x_2i, x_2i+1), each turned by its angle at position i."""
    out = np.array(x)
    for pair in range(len(x) // 2):
        angle = i * base ** (-2 * pair / len(x))
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_gated_attention(gate):
    module = built(layers.GatedAttention(heads=4, key_heads=2, gate=gate))
    x = X[0]
    q, k, v = heads(module.query, x, 4), heads(module.key, x, 2), heads(module.value, x, 2)
    gates = 1 / (1 + np.exp(-linear(module.gate.projection, x)))
    gates = gates.reshape(T, 4, -1)
    o = [attended(lambda i, j, h=h: q[i, h] @ k[j, h // 2] / 2, v[:, h // 2]) * gates[:, h] for h in range(4)]
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))


@pytest.mark.parametrize("key_heads", [2, 4])
def test_differential_attention(key_heads):
    module = built(layers.DifferentialAttention(heads=4, key_heads=key_heads))
    x, r = X[0], 4 // key_heads
    q = linear(module.query, x).reshape(T, key_heads, 2, r, 2)
    k = linear(module.key, x).reshape(T, key_heads, 2, 2)
    v = heads(module.value, x, key_heads)
    a1, b1, a2, b2 = w(module.vectors)
    start = float(w(module.start))
    weight = math.exp(a1 @ b1) - math.exp(a2 @ b2) + start
    o = []
    for head in range(4):
        g, one = divmod(head, r)
        maps = [
            attended(lambda i, j, m=m, g=g, one=one: q[i, g, m, one] @ k[j, g, m] / math.sqrt(2), v[:, g])
            for m in (0, 1)
        ]
        o.append(rms(maps[0] - weight * maps[1], w(module.norm.gain), 1e-5) * (1 - start))
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))


def test_differential_attention_starts_as_published():
    for layer in (0, 1, 7):
        module = layers.DifferentialAttention(heads=2).build(256, Place(layer, 8), nnx.Rngs(params=jax.random.key(0)))
        assert abs(float(module.start[...]) - (0.8 - 0.6 * math.exp(-0.3 * layer))) < 1e-6
        assert abs(float(jnp.std(module.vectors[...])) - 0.1) < 0.02


def test_forgetting_attention():
    module = built(layers.ForgettingAttention(heads=4, key_heads=2))
    x = X[0]
    q, k, v = heads(module.query, x, 4), heads(module.key, x, 2), heads(module.value, x, 2)
    f = 1 / (1 + np.exp(-linear(module.forget, x)))

    def score(i, j, h):
        faded = math.prod(f[m, h] for m in range(j + 1, i + 1))
        return q[i, h] @ k[j, h // 2] / 2 + math.log(faded)

    o = [attended(lambda i, j, h=h: score(i, j, h), v[:, h // 2]) for h in range(4)]
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))


@pytest.mark.parametrize(("rotary", "query_rank", "turns"), [(4, None, True), (4, 6, False), (0, None, False)])
def test_latent_attention(rotary, query_rank, turns):
    positions = Rotary(layout="interleaved") if turns else None
    config = layers.LatentAttention(
        heads=2, rank=7, query_rank=query_rank, key_dim=5, value_dim=3, rotary_dim=rotary, positions=positions
    )
    module = built(config)
    x = X[0]
    latent = rms(linear(module.down, x), w(module.norm.gain))
    from_ = x if query_rank is None else rms(linear(module.query_down, x), w(module.query_norm.gain))
    q, k, v = heads(module.query, from_, 2), heads(module.key_up, latent, 2), heads(module.value_up, latent, 2)
    shared = linear(module.shared_key, x) if rotary else np.zeros((T, 0))

    def score(i, j, h):
        of_query, of_key = q[i, h, 5:], shared[j]
        if turns:
            of_query, of_key = turned(of_query, i), turned(of_key, j)
        return (q[i, h, :5] @ k[j, h] + of_query @ of_key) / math.sqrt(5 + rotary)

    o = [attended(lambda i, j, h=h: score(i, j, h), v[:, h]) for h in range(2)]
    expected = linear(module.output, np.concatenate(o, axis=-1))
    assert_equal(module, expected)
    # Decoding absorbs the maps, and keeps rank + rotary numbers a token.
    state = module.init_state(1, T)
    assert sum(leaf[0].size for leaf in (state.keys, state.values)) == T * (7 + rotary)
    outs = []
    for i in range(T):
        out, state = module.extend(jnp.asarray(X[:, i : i + 1], jnp.float32), state)
        outs.append(np.asarray(out.hidden[0, 0]))
    np.testing.assert_allclose(np.stack(outs), expected, atol=CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("shared", [True, False])
def test_relative_convolutional_attention(shared):
    module = built(layers.RelativeConvolutionalAttention(heads=2, shared_filters=shared, maximum=T))
    x = X[0]

    def convolved(name):
        one = getattr(module, name)
        y, taps, bias = linear(one, x).reshape(T, 2, 8), w(one.convolution.taps), w(one.convolution.bias)
        out = np.zeros_like(y)
        for t in range(T):
            for h in range(2):
                channels = slice(0, 8) if shared else slice(8 * h, 8 * h + 8)
                out[t, h] = bias[channels] + sum(taps[n, channels] * y[t - n, h] for n in range(3) if t >= n)
        return out

    q, k, v = (convolved(name) for name in ("query", "key", "value"))
    u, r, b = w(module.content), w(module.by_distance), w(module.of_distance)

    def score(i, j, h):
        return ((q[i, h] + u[h]) @ k[j, h] + q[i, h] @ r[i - j, h] + b[i - j, h]) / math.sqrt(8)

    o = [attended(lambda i, j, h=h: score(i, j, h), v[:, h]) for h in range(2)]
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))


def test_relative_convolutional_attention_multiplies_no_more_distances_than_tokens():
    """With positions, which may leave gaps, it multiplies all that have entries; the outputs are the same."""
    module, x = built(layers.RelativeConvolutionalAttention(heads=2, maximum=99)), jnp.asarray(X, jnp.float32)
    counted = Context(positions=jnp.arange(T)[None])
    plain, placed = (str(jax.make_jaxpr(lambda x, c=c: module(x, c).hidden)(x)) for c in (Context(), counted))
    assert f"1,2,{T},99]" in placed and f"1,2,{T},99]" not in plain
    np.testing.assert_allclose(module(x).hidden, module(x, counted).hidden, rtol=1e-5, atol=1e-6)


def test_relative_convolutional_attention_starts_as_published():
    module = layers.RelativeConvolutionalAttention(heads=4, maximum=9).build(256, Place(), nnx.Rngs(params=0))
    for part in (module.content, module.by_distance, module.of_distance):
        assert not np.any(part[...])
    taps = np.asarray(module.query.convolution.taps[...])
    assert taps.shape == (3, 64) and np.abs(taps).max() <= 3**-0.5 and abs(np.std(taps) - 1 / 3) < 0.05
    assert module.value.bias is not None and module.query.bias is None and module.output.bias is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.DifferentialAttention(heads=16).build(16, Place(), nnx.Rngs(0)), r"halves a head's 1 dim"),
        (lambda: layers.LatentAttention(heads=3).build(16, Place(), nnx.Rngs(0)), r"heads=3 does not divide .* 16"),
        (lambda: layers.LatentAttention(rotary_dim=3), r"rotary_dim=3: must be even"),
        (lambda: layers.PathAttention(positions=Rotary()), r"positions=Rotary: PathAttention has positions"),
        (lambda: MeanBlocks(top=0), r"top=0: must be at least 1"),
        (lambda: LightningIndexer(top=0), r"top=0: must be at least 1"),
        (lambda: layers.NativeSparseAttention(stride=3), r"stride=3: must divide block=8 and size=8"),
        (lambda: layers.NativeSparseAttention(top=2), r"top=2: must hold the local=2 newest blocks and the first"),
        (lambda: layers.NativeSparseAttention(dropout=0.1), r"three softmax maps: dropout cannot be set"),
        (lambda: layers.LatentAttention(rank=0), r"rank=0: must be at least 1"),
        (lambda: layers.RelativeConvolutionalAttention(positions=Rotary()), r"positions=Rotary beside relative=True"),
        (lambda: layers.RelativeConvolutionalAttention(kernel=0), r"kernel=0: a convolution needs at least 1 tap"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_path_attention():
    module = built(layers.PathAttention(heads=4, key_heads=2, rank=5))
    x = X[0]
    q, k, v = heads(module.query, x, 4), heads(module.key, x, 2), heads(module.value, x, 2)
    y, taps = linear(module.direction, linear(module.down, x)), w(module.direction.convolution.taps)
    y = np.stack([sum(taps[n] * y[t - n] for n in range(3) if t >= n) for t in range(T)])
    y = (y / (1 + np.exp(-y))).reshape(T, 2, 4)
    directions = y / np.sqrt(np.sum(y**2, axis=-1, keepdims=True) + 1e-6)
    beta = 2 / (1 + np.exp(-linear(module.strength, x)))

    def score(i, j, h):
        key = k[j, h // 2]
        for m in range(j + 1, i + 1):
            one = directions[m, h // 2]
            key = key - beta[m, h // 2] * one * (one @ key)
        return q[i, h] @ key / 2

    o = [attended(lambda i, j, h=h: score(i, j, h), v[:, h // 2]) for h in range(4)]
    assert_equal(module, linear(module.output, np.concatenate(o, axis=-1)))
