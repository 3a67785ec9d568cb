"""Gates, norms of heads, skips and low-rank maps against their equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.layers.modules import (
    BlockDiagonal,
    HeadNormalization,
    Interpolation,
    Linear,
    LowRank,
    OutputGate,
    Skip,
    Strength,
    orthogonal,
    torch_uniform,
    unit,
)

RNG = np.random.default_rng(0)
X, OUTPUTS = RNG.normal(size=(2, 5, 12)), RNG.normal(size=(2, 5, 3, 4))


def rngs():
    return nnx.Rngs(params=jax.random.key(0))


def f32(x):
    return jnp.asarray(x, jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def assert_close(result, expected, size=1e-6):
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(result, np.float64) - expected).max() < size * max(1, np.abs(expected).max())


def test_unit_vectors():
    assert_close(unit(f32(OUTPUTS)), OUTPUTS / np.sqrt((OUTPUTS**2).sum(-1, keepdims=True) + 1e-6))
    assert np.asarray(unit(jnp.zeros((2, 4)))).max() == 0  # no division by zero
    low = unit(f32(OUTPUTS).astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("activation", ["none", "tanh", "sigmoid"])
def test_low_rank(activation):
    low = LowRank(12, 2, 6, "hk", rngs(), bias=True, activation=activation)
    low.up.bias[...] = jnp.arange(6.0)
    down, up = (np.asarray(part.kernel[...], np.float64) for part in (low.down, low.up))
    inner = {"none": lambda x: x, "tanh": np.tanh, "sigmoid": sigmoid}[activation](X @ down)
    assert_close(low(f32(X)), inner @ up + np.arange(6))
    assert down.shape == (12, 2) and [part.kernel.dims for part in (low.down, low.up)] == ["d u", "u hk"]


def test_block_diagonal():
    blocks = BlockDiagonal(12, 3, rngs())
    blocks.bias[...] = jnp.arange(12.0)
    whole = np.zeros((12, 12))
    for head, block in enumerate(np.asarray(blocks.kernel[...], np.float64)):
        whole[4 * head : 4 * head + 4, 4 * head : 4 * head + 4] = block
    assert_close(blocks(f32(X)), X @ whole + np.arange(12))


def test_strength():
    for largest in (1.0, 2.0):
        strength = Strength(12, 3, rngs(), largest=largest)
        assert_close(strength(f32(X)), largest * sigmoid(X @ np.asarray(strength.projection.kernel[...], np.float64)))
    assert strength(f32(X).astype(jnp.bfloat16)).dtype == jnp.float32


def test_skip():
    skip = Skip(3)
    assert_close(skip(f32(OUTPUTS), f32(2 * OUTPUTS)), 3 * OUTPUTS)
    skip.weight[...] = jnp.arange(3.0)
    assert_close(skip(f32(OUTPUTS), f32(OUTPUTS)), OUTPUTS * (1 + np.arange(3))[:, None])


def normalised(o, kind):
    if kind == "group":
        o = o - o.mean(-1, keepdims=True)
    return o / np.sqrt((o**2).mean((-2, -1) if kind == "all" else -1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("kind", ["head", "all", "group"])
def test_norms_of_heads(kind):
    norm = HeadNormalization(3, 4, kind)
    expected = normalised(OUTPUTS, kind)
    assert_close(norm(f32(OUTPUTS)), expected)
    assert norm.gain.shape == ((4,) if kind == "head" else (3, 4)) and (norm.bias is None) == (kind != "group")
    gain = RNG.normal(size=norm.gain.shape)
    norm.gain[...] = f32(gain)
    assert_close(norm(f32(OUTPUTS)), expected * gain)
    assert HeadNormalization(3, 4, kind, gain=False).gain is None


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "none"])
def test_output_gate(activation, gate_first):
    projection, norm = Linear(12, 12, "d hv", rngs()), HeadNormalization(3, 4, "head")
    gate = OutputGate(projection, activation=activation, norm=norm, gate_first=gate_first)
    z = (X @ np.asarray(projection.kernel[...], np.float64)).reshape(OUTPUTS.shape)
    z = {"silu": z * sigmoid(z), "sigmoid": sigmoid(z), "none": z}[activation]
    expected = normalised(OUTPUTS * z, "head") if gate_first else normalised(OUTPUTS, "head") * z
    assert_close(gate(f32(OUTPUTS), f32(X)), expected.reshape(2, 5, 12), 1e-5)


def test_output_gate_per_head_without_a_norm():
    """As gated attention's headwise form."""
    projection = Linear(12, 3, "d h", rngs())
    z = sigmoid(X @ np.asarray(projection.kernel[...], np.float64))
    gate = OutputGate(projection, activation="sigmoid")
    assert_close(gate(f32(OUTPUTS), f32(X)), (OUTPUTS * z[..., None]).reshape(2, 5, 12))


def test_interpolation():
    mix = RNG.random(12)
    assert_close(Interpolation(f32(mix))(f32(X), f32(2 * X)), X + X * mix)


def test_initialisers():
    weights = np.asarray(torch_uniform()(jax.random.key(0), (16, 500), jnp.float32))
    assert np.abs(weights).max() <= 0.25 and abs(weights.std() - 0.25 / 3**0.5) < 0.005
    square = np.asarray(orthogonal(0.1)(jax.random.key(0), (8, 5), jnp.float32))
    assert_close(square.T @ square, 0.01 * np.eye(5))
