"""Backend jla: jax-linear-attention's plain JAX in our arguments, held to the specification; what it refuses.

Where the package is missing, its tests are skipped: .ci/gpu-interpreter makes an environment that has it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os

import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import accelerators, dispatch
from recollect.pallas_kernels.dispatch import aimed_at, interpreted, recorded_choices
from recollect.pallas_kernels.linear_recurrence import Recurrence, jla
from tests.pallas_kernels.test_linear_recurrence import CLOSE, error, linear_recurrence
from tests.pallas_kernels.test_linear_recurrence_family import arguments, compare
from tests.pallas_kernels.test_linear_recurrence_models import PUBLISHED

INSTALLED = accelerators.jla_is_here() is None
# On a device the backend runs the package's kernels and not these forms, and takes bf16 alone.
needs_it = pytest.mark.skipif(
    not INSTALLED or bool(os.environ.get("RECOLLECT_ON_DEVICE")),
    reason=str(accelerators.jla_is_here() or "plain forms"),
)
# Its decays are differences of sums over a chunk: of sums in the thousands, fp32 keeps three digits behind the point.
ABRUPT = 1e-3

CASES = [
    # t, decay, erase, state, segments
    (1, "token", "scalar", True, True),
    (63, None, None, False, False),
    (63, "token", None, True, True),
    (65, "channel", None, True, True),
    (65, "mixed", None, True, True),
    (63, None, "scalar", True, False),
    (63, "token", "scalar", True, True),
    (33, "channel", "vector", False, True),
    (63, "channel", "apart", True, True),
    (5, "mixed", "apart", False, False),
]


@pytest.mark.gpu_interpreter
@needs_it
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_it_is_the_recurrence(case):
    with interpreted():
        run = functools.partial(linear_recurrence, backend="jla")
        compare(run, *arguments(*case), ABRUPT if case[1] == "mixed" else CLOSE)


@pytest.mark.gpu_interpreter
@needs_it
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_served(model):
    given, expected = PUBLISHED[model]()
    given = {name: x if isinstance(x, bool) else jnp.asarray(x, jnp.float32) for name, x in given.items()}
    with interpreted():
        o, _ = linear_recurrence(**given, backend="jla")
    assert error(o, expected) < (ABRUPT if model == "Comba" else CLOSE)  # some of Comba's gates are -800


@pytest.mark.gpu_interpreter
@needs_it
def test_what_padding_holds_is_not_read():
    given, fixed = arguments(20, "channel", "apart", True, True)
    padding = fixed["segment_ids"] == 0
    assert padding.any()
    with interpreted():
        clean, _ = linear_recurrence(**given, **fixed, backend="jla")
        rows = {name: np.array(x) for name, x in given.items()}
        for name in set(rows) - {"initial_state"}:
            rows[name][padding] = np.nan
        o, _ = linear_recurrence(**rows, **fixed, backend="jla")
    np.testing.assert_array_equal(o, clean)


def _rows(dtype=jnp.bfloat16, h=2, k=64, v=64):
    return {"q": jnp.ones((1, 4, h, k), dtype), "k": jnp.ones((1, 4, h, k), dtype), "v": jnp.ones((1, 4, h, v), dtype)}


@pytest.mark.parametrize(
    "inputs, chunk_size, reason",
    [
        (_rows(), 64, "choose their chunks"),
        (_rows(jnp.float32), None, "take bfloat16; these are float32"),
        (_rows(k=32), None, "64 or 128 channels; these are 32 and 64"),
        (_rows(h=1) | {"log_decay": jnp.zeros((1, 4, 1, 64))}, None, "128 channels in all heads; these are 64"),
    ],
)
def test_refusals_have_reasons(inputs, chunk_size, reason):
    assert reason in jla.refuses(Recurrence(**inputs), chunk_size=chunk_size)


def test_its_kernels_take_what_is_left():
    assert jla.refuses(Recurrence(**_rows())) is None
    assert jla.refuses(Recurrence(**_rows(k=128), log_decay=jnp.zeros((1, 4, 2, 128)))) is None


@pytest.mark.skipif(INSTALLED, reason="it is installed")
def test_a_missing_package_is_named():
    message = r"jla cannot serve this call: jax-linear-attention (is not installed|needs jax)"
    with aimed_at("gpu", "NVIDIA H100 80GB HBM3"), pytest.raises(ValueError, match=message):
        linear_recurrence(**_rows(), backend="jla")


@pytest.mark.gpu_interpreter
@needs_it
def test_it_needs_a_hopper_gpu():
    with pytest.raises(ValueError, match="it runs on NVIDIA Hopper GPUs; this is cpu"):
        linear_recurrence(**_rows(), backend="jla")
    with aimed_at("gpu", "NVIDIA A100"):
        assert "Hopper" in dispatch.kernels_run_here("jla")
    with aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        assert dispatch.kernels_run_here("jla") is None


def test_another_jax_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    monkeypatch.setattr(dispatch.jax, "__version__", "0.12.0")
    assert accelerators.jla_is_here.__wrapped__() == "jax-linear-attention needs jax 0.11.2; this is 0.12.0"


@pytest.mark.gpu_interpreter
def test_it_is_never_preferred():
    with recorded_choices() as choices:
        linear_recurrence(**_rows(jnp.float32))
    assert [choice.backend for choice in choices] == ["xla"]
