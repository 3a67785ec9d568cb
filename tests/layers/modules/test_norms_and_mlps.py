"""Norms and MLPs against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Place
from recollect.layers.modules.mlp import GELU, SGLU, GeGLU, SwiGLU
from recollect.layers.modules.norms import LayerNorm, RMSNorm
from recollect.layers.modules.simple_rms_norm import SRMSNorm

X = np.random.default_rng(0).normal(1.0, 2.0, (3, 5, 8)).astype(np.float32)


def randomised(module):
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(1)
    return nnx.merge(
        graph, jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    )


def value(parameter):
    return np.asarray(parameter[...], np.float64)


def test_norms():
    x = X.astype(np.float64)
    rms = randomised(RMSNorm(epsilon=0.1).build(8))
    np.testing.assert_allclose(
        rms(jnp.asarray(X)), x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * value(rms.gain), rtol=1e-5, atol=1e-6
    )
    layer = randomised(LayerNorm(epsilon=0.1).build(8))
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(
        layer(jnp.asarray(X)), centred * value(layer.gain) + value(layer.bias), rtol=1e-5, atol=1e-6
    )
    plain = SRMSNorm(epsilon=0.1).build(8)
    np.testing.assert_allclose(plain(jnp.asarray(X)), x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1), rtol=1e-5)
    assert not jax.tree.leaves(nnx.state(plain))
    assert LayerNorm(bias=False).build(8).bias is None
    np.testing.assert_allclose(
        RMSNorm().build(8)(jnp.asarray(X)), x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5
    )  # gain starts at 1


@pytest.mark.parametrize("config", [RMSNorm(), LayerNorm(), SRMSNorm()], ids=["rms", "layer", "simple"])
def test_statistics_are_fp32(config):
    norm = config.build(4096)
    large = (300 + np.random.default_rng(2).normal(size=(1, 4096))).astype(
        jnp.bfloat16
    )  # a bf16 sum of squares would be off by percents
    out = norm(jnp.asarray(large))
    assert out.dtype == jnp.bfloat16
    expected = norm(jnp.asarray(large, jnp.float32))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0.004, atol=1e-6)


def test_mlps():
    x, erf = X.astype(np.float64), np.vectorize(math.erf)
    gelu = randomised(GELU(bias=True).build(8, Place(), nnx.Rngs(params=jax.random.key(0))))
    assert gelu.up.kernel.shape == (8, 32)
    u = x @ value(gelu.up.kernel) + value(gelu.up.bias)
    np.testing.assert_allclose(
        gelu(jnp.asarray(X)),
        (u * 0.5 * (1 + erf(u / 2**0.5))) @ value(gelu.down.kernel) + value(gelu.down.bias),
        rtol=1e-4,
        atol=1e-4,
    )
    swiglu = randomised(SwiGLU(hidden=5).build(8, Place(), nnx.Rngs(params=jax.random.key(0))))
    g = x @ value(swiglu.gate.kernel)
    np.testing.assert_allclose(
        swiglu(jnp.asarray(X)),
        (g / (1 + np.exp(-g)) * (x @ value(swiglu.up.kernel))) @ value(swiglu.down.kernel),
        rtol=1e-4,
        atol=1e-4,
    )
    for config, activation in (
        (SGLU(hidden=5), lambda u: u),
        (GeGLU(hidden=5), lambda u: 0.5 * u * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3)))),
    ):
        gated = randomised(config.build(8, Place(), nnx.Rngs(params=0)))
        inner = activation(x @ value(gated.gate.kernel)) * (x @ value(gated.up.kernel))
        np.testing.assert_allclose(gated(jnp.asarray(X)), inner @ value(gated.down.kernel), rtol=1e-4, atol=1e-4)
    assert SwiGLU().inner(768) == 2048 and SwiGLU(hidden=7).inner(768) == 7


def test_the_residual_write_starts_small_in_deep_models():
    deep = SwiGLU(hidden=500).build(100, Place(0, 50), nnx.Rngs(params=jax.random.key(0)))
    assert np.std(value(deep.up.kernel)) == pytest.approx(0.02, rel=0.02)
    assert np.std(value(deep.down.kernel)) == pytest.approx(0.002, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"), [({"hidden": 0}, "hidden=0"), ({"expansion": 0.0}, r"expansion=0\.0")]
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        GELU(**settings)
