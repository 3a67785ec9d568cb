"""Sums of log decays between tokens: their accuracy, and that XLA compiles their gradient within seconds."""

import os
import subprocess
import sys

import jax
import numpy as np

from recollect.pallas_kernels.linear_recurrence.chunk_matrices import _between


def test_sums_between_tokens_are_accurate_whatever_decays_stand_before():
    c = 32
    g = -np.exp(3 * np.random.default_rng(0).normal(size=(4, c))).astype(np.float32)
    before = np.tril(np.ones((c, c)), -1)
    expected = np.cumsum(before * g.astype(np.float64)[..., None], axis=-2) * before
    off = np.abs(np.asarray(jax.jit(_between)(g), np.float64) - expected)
    assert (off <= 5e-7 * np.abs(expected)).all()


GRADIENT = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
import jax, jax.numpy as jnp
from flax import nnx
from recollect import layers
from recollect.layers.mixer import Place

graph, weights = nnx.split(layers.Mamba3().build(32, Place(), nnx.Rngs(params=jax.random.key(0))))
loss = lambda weights, x: jnp.sum(jnp.sin(nnx.merge(graph, weights)(x).hidden))
jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(weights, jnp.ones((4, 64, 32))).compile()
"""


def test_the_gradient_of_mamba_3_compiles_in_seconds_and_megabytes():
    """At this batch, width and length XLA took minutes and ten gigabytes where the sums were nested cumsums."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", GRADIENT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
