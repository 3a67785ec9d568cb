"""A bias of softmax attention's scores: the specification against loops in float64, xla's forms against the
specification, and kernels' refusals."""

from __future__ import annotations

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.layers.packing import document_positions
from recollect.pallas_kernels.dispatch import aimed_at
from recollect.pallas_kernels.masks import Causal, SameSegment, Sinks, Window
from recollect.pallas_kernels.softmax_attention import BACKENDS, softmax_attention
from tests.pallas_kernels.test_softmax_attention import CLOSE, arrays, error, ragged


def test_the_specification_is_the_definition():
    q, k, v = (np.asarray(x, np.float64) for x in arrays(1, 9, 2, 1))
    bias = np.random.default_rng(0).normal(size=(1, 2, 9, 9))
    bias[0, 1, 5, 3] = -np.inf  # hidden from one head
    expected = np.zeros((1, 9, 2, 6))
    for h in range(2):
        for i in range(9):
            scores = [q[0, i, h] @ k[0, j, 0] / np.sqrt(8) + bias[0, h, i, j] for j in range(i + 1)]
            weights = np.exp(scores)
            expected[0, i, h] = sum(w * v[0, j, 0] for j, w in enumerate(weights / weights.sum()))
    for backend in ("reference", "xla"):
        out = softmax_attention(
            *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), bias=jnp.asarray(bias), backend=backend
        )
        assert error(out, expected) < CLOSE


@functools.partial(jax.jit, static_argnames=("window", "mask", "backend"))
def values_and_gradients(q, k, v, bias, fields, sinks, *, window=None, mask=None, backend):
    def run(q, k, v, bias):
        out, lse = softmax_attention(
            q, k, v, bias=bias, sinks=sinks, window=window, mask=mask, return_lse=True, backend=backend, **fields
        )
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weights) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * weights[..., 0]), out

    gradients, out = jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    return out, *gradients


@pytest.mark.parametrize(
    ("t", "s", "rows", "heads", "how"),
    [
        (257, 257, 1, 4, {}),
        (130, 130, 2, 1, {"window": 9}),
        (70, 70, 2, 4, {"mask": Causal() & SameSegment() & (Window(5) | Sinks(3))}),
        (5, 40, 2, 4, {}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_xla_agrees_with_gradients(t, s, rows, heads, how, packed):
    q, k, v = arrays(2, t, 4, 2, s=s)
    bias = jax.random.normal(jax.random.key(7), (rows, heads, t, s))
    fields = {}
    if packed or t != s or "mask" in how:
        segments = ragged(2, s)
        keys = {"key_segments": segments, "key_positions": document_positions(segments)}
        fields = {f"query_{name[4:]}": x[:, s - t :] for name, x in keys.items()} | (keys if t != s else {})
    call = functools.partial(values_and_gradients, q, k, v, bias, fields, jnp.array([0.5, -1.0, 3.0, 0.0]), **how)
    for name, got, expected in zip(
        ("out", "q", "k", "v", "bias"), call(backend="xla"), call(backend="reference"), strict=True
    ):
        assert error(got, expected) < CLOSE, name


def test_wrong_shapes_are_named():
    q, k, v = arrays(2, 6, 4, 2)
    for shape in ((2, 4, 6, 5), (4, 6, 6), (2, 2, 6, 6), (3, 4, 6, 6)):
        with pytest.raises(ValueError, match="bias must be"):
            inspect.unwrap(softmax_attention)(q, k, v, bias=jnp.zeros(shape))


@pytest.mark.parametrize("backend", ["cudnn", "pallas_gpu", "splash", "pallas_tpu"])
def test_kernels_refuse_a_bias_and_dropout_by_name(backend):
    q, k, v = arrays(1, 512, 2, 2, k=64, v=64, dtype=jnp.bfloat16)
    nothing = ("window", "mask", "sinks", "scale", "return_lse", "deterministic")
    fields = [f"{side}_{name}" for side in ("query", "key") for name in ("positions", "segments", "fields")]
    refuses = importlib.import_module(BACKENDS[backend]).refuses
    call = dict.fromkeys([*nothing, *fields], None)
    pairs, none = jnp.zeros((1, 1, 512, 512)), {"bias": None, "dropout": None}
    refusals = {"bias": "it takes no bias of scores", "dropout": "it takes no dropout of weights"}
    for name, refusal in refusals.items():
        assert refuses(q, k, v, **{**none, name: pairs}, **call) == refusal
        with aimed_at("tpu", "TPU v5 lite"):
            assert softmax_attention(q, k, v, **{name: pairs}).shape == q.shape
    assert refuses(q, k, v, **none, **call) not in refusals.values()
