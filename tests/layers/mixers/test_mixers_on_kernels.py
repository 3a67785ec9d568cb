"""Softmax mixers on simulated TPU kernels against the same mixers on xla: outputs and gradients, packed documents
with padding."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.layers.mixer import Context, Place
from recollect.layers.mixers.attention import Attention
from recollect.layers.mixers.landmark import Landmark
from recollect.layers.mixers.mixture_of_heads import MixtureOfHeads
from recollect.layers.mixers.sliding_window import SlidingWindow
from recollect.layers.modules.positions import Rotary
from recollect.layers.packing import document_positions
from recollect.pallas_kernels import dispatch

WIDTH, LENGTH = 32, 75
MIXERS = {
    "attention": (Attention(heads=4, key_heads=2, positions=Rotary()), {"softmax_attention"}),
    "learned sinks": (SlidingWindow(window=9, heads=2, sinks="learned"), {"softmax_attention"}),
    "first tokens": (SlidingWindow(window=9, heads=2, sinks="first", first=3), {"softmax_attention"}),
    "landmark": (Landmark(block=7, heads=2), {"landmark_attention"}),
    "mixture of heads": (
        MixtureOfHeads(heads=5, shared=1, active=2, head_dim=8),
        {"softmax_attention", "head_mixture_attention"},
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_kernels_serve_the_mixer_and_change_nothing(name):
    config, operations = MIXERS[name]
    mixer = config.build(WIDTH, Place(0, 1), nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
    segments = jnp.asarray(
        np.repeat([[1] * 30 + [0] * 4 + [2] * 41, [1] * 52 + [3] * 15 + [0] * 8], 1, axis=0), jnp.int32
    )
    context = Context(segments=segments, positions=document_positions(segments))

    def loss(params, x):
        out = nnx.merge(graph, params)(x, context)
        real = (segments != 0)[..., None]
        return jnp.sum(jnp.sin(jnp.where(real, out.hidden, 0))) + sum(out.losses.values()), jnp.where(
            real, out.hidden, 0
        )

    def on(backend):
        # So short a sequence would be computed densely.
        gathered = mock.patch("recollect.layers.mixers.mixture_of_heads.skips", return_value=True)
        with (
            gathered,
            dispatch.preferred_backend(backend),
            dispatch.interpreted(),
            dispatch.recorded_choices() as choices,
        ):
            results = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return results, {choice.operation for choice in choices if choice.backend == backend}

    (found, used), (expected, _) = on("pallas_tpu"), on("xla")
    assert used == operations
    for path, leaf in jax.tree.leaves_with_path(found):
        other = np.asarray(next(y for at, y in jax.tree.leaves_with_path(expected) if at == path), np.float64)
        assert np.sqrt(np.mean((np.asarray(leaf) - other) ** 2)) <= 2e-5 * max(1e-6, np.sqrt(np.mean(other**2))), path
