"""Landmark attention's GPU kernels, simulated with race detection: values and all gradients against the
specification."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.landmark_attention import kernels, landmark_attention, reference, xla
from recollect.pallas_kernels.scheduled_attention import gpu
from tests.pallas_kernels.landmark_arguments import arrays, rows
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.test_landmark_attention_kernels import NAMES, off, packed, results

on_gpu, _ = kernels.on_kernels(gpu)

CASES = [
    # documents (None: one), t, h, g, dimensions, block
    (None, 70, 1, 1, 64, 20),
    pytest.param(([[30, -3, 97]], 130, 2, 1, 64, 50), marks=pytest.mark.wide),
    pytest.param((None, 1, 2, 1, 64, 50), marks=pytest.mark.wide),
    pytest.param((None, 257, 2, 2, 128, 63), marks=pytest.mark.wide),
    pytest.param(([[17, -3, 20]], 40, 1, 1, 32, 8), marks=pytest.mark.wide),
    pytest.param(([[-3, 30, -7, 30]], 70, 1, 1, 64, 8), marks=pytest.mark.wide),
]


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_kernels_are_the_specification(case):
    documents, t, h, g, dim, block = case
    half = tuple(
        x.astype(jnp.bfloat16) for x in arrays(1 if documents is None else len(documents), t, h, g, k=dim, v=dim)
    )
    f = {} if documents is None else packed(rows(*documents))
    with dispatch.interpreted("races"):
        found = results(on_gpu, *half, f, block)
        assert not races_found()
    expected = results(reference.landmark_attention, *(x.astype(jnp.float32) for x in half), f, block)
    plain = results(xla.landmark_attention, *half, f, block)
    for name, a, b, c in zip(NAMES, found, expected, plain, strict=True):
        assert a.dtype == (jnp.float32 if name == "lse" else jnp.bfloat16)
        assert np.all(np.asarray(b) == 0) or off(a, b) < min(
            0.005 if name in ("out", "lse") else 0.01, max(0.005, 2 * off(c, b))
        ), name


@pytest.mark.gpu_interpreter
@pytest.mark.wide
def test_padding_full_of_nan_touches_nothing_and_runs_repeat():
    segments = rows([-3, 30, -7, 30])
    real = (segments != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0).astype(jnp.bfloat16) for x in arrays(1, 70, 1, 1, k=64, v=64))
    dirty = tuple(jnp.where(real, x, jnp.nan) for x in clean)
    with dispatch.interpreted():
        first, again, other = (results(on_gpu, *x, packed(segments), 20) for x in (clean, clean, dirty))
    for found in (again, other):
        jax.tree.map(np.testing.assert_array_equal, first, found)


@pytest.mark.gpu_interpreter
def test_what_it_does_not_serve_is_told():
    q, k, v = arrays(1, 20, 2, 1)
    call = functools.partial(landmark_attention, backend="pallas_gpu")
    with dispatch.interpreted():
        with pytest.raises(ValueError, match="its products take bfloat16; q is float32"):
            call(q, k, v, block=4)
        with pytest.raises(ValueError, match="a landmark block of more than 63 keys"):
            call(*(x.astype(jnp.bfloat16) for x in (q, k, v)), block=64)
