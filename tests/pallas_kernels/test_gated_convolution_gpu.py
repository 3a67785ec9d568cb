"""The convolutions' GPU kernels, simulated with race detection: values and all gradients against the specification
in fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch, mosaic_gpu
from recollect.pallas_kernels.gated_convolution import gpu, gpu_long, long_convolution, short_convolution
from recollect.pallas_kernels.gated_convolution.short_kernels import Operands
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.test_gated_convolution import (
    compare,
    errors,
    exact_long,
    exact_short,
    exactly,
    long_arguments,
    measured,
    results,
    short_arguments,
)

short = functools.partial(short_convolution, backend="pallas_gpu")
long = functools.partial(long_convolution, backend="pallas_gpu")

SHORT_CASES = [
    # t, activation, state returned, what else
    (1, "silu", True, {"d": 3}),
    (37, "silu", True, {"segments": "packed", "taps": 3, "b": 1, "gates": "out"}),
    (70, "none", True, {"gates": "in", "d": 130, "b": 1}),
    (20, "none", False, {"taps": 1, "gates": "", "state": False, "bias": False}),
    pytest.param((63, "silu", True, {"segments": "ragged"}), marks=pytest.mark.wide),
    pytest.param((257, "silu", True, {"taps": 8, "b": 1}), marks=pytest.mark.wide),
    pytest.param(
        (70, "silu", True, {"segments": "packed", "taps": 6, "d": 130, "gates": "", "b": 1}), marks=pytest.mark.wide
    ),
]
LONG_CASES = [
    # t, what else
    (1, {"b": 8, "d": 8, "skip": False}),
    (257, {"length": 100, "b": 3}),
    pytest.param((63, {"length": 80, "gates": ""}), marks=pytest.mark.wide),
    pytest.param((1000, {"b": 72, "d": 1, "gates": "in", "skip": False}), marks=pytest.mark.wide),
]


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("case", SHORT_CASES, ids=str)
def test_short_kernels_are_the_sum(case):
    t, activation, return_state, sizes = case
    given, fixed = short_arguments(t, **sizes)
    how = {"activation": activation, "return_state": return_state}
    with dispatch.interpreted("races"):
        found = results(functools.partial(short, **how), given, fixed)
        assert not races_found()
    compare(found, exactly(functools.partial(exact_short, **how), given, fixed), 1e-4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (63, 5), (64, 128), (65, 2048)])
def test_no_tile_is_written_past_the_end_of_its_row(tokens, width, backward):
    """With all channels in one tile a copy out is one piece of memory, clipped at the end of the array alone: on an
    H100 rows began with zeros that belonged past the end of the row before. The simulator clips."""
    if mosaic_gpu.plgpu is None:
        pytest.skip(str(mosaic_gpu.unavailable()))
    x = jnp.zeros((2, tokens, width))
    operands = Operands(x, x, x, jnp.zeros((16, width)), jnp.zeros((2, 8, width)), None)
    plan = gpu._TilePlan(operands, 4, backward=backward, dy=x if backward else None)
    assert plan.channels > plan.lanes or plan.like_x().shape[1] >= plan.count * plan.length
    assert plan.cut(jnp.zeros(plan.like_x().shape)).shape == x.shape


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_kernels_are_the_sum(case):
    t, sizes = case
    given, fixed = long_arguments(t, dtype=jnp.bfloat16, **sizes)
    with dispatch.interpreted("races"):
        found = results(long, given, fixed)
        assert not races_found()
    near(found, given, long_convolution, exact_long, fixed)


@pytest.mark.gpu_interpreter
def test_short_kernels_in_half_precision():
    given, fixed = short_arguments(40, dtype=jnp.bfloat16, b=1, d=8)
    how = {"activation": "silu", "return_state": True}
    with dispatch.interpreted():
        found = results(functools.partial(short, **how), given, fixed)
    near(found, given, functools.partial(short_convolution, **how), functools.partial(exact_short, **how), fixed)


def near(found, given, run, exact, fixed) -> None:
    """bf16 results against fp64, and against xla on bf16."""
    assert found[0][0].dtype == jnp.bfloat16 and {name: x.dtype for name, x in found[1].items()} == {
        n: x.dtype for n, x in given.items()
    }
    expected = exactly(exact, given, fixed)
    kernel, plain = (
        errors(found, expected),
        errors(results(functools.partial(run, backend="xla"), given, fixed), expected),
    )
    for name, value in kernel.items():
        assert value < (0.005 if name.startswith("output") else 0.01), (name, value)
        # The state and the gradients of taps are exact sums in xla; products of the long kernels round their
        # factors.
        assert value < max(2 * plain[name], 0.005), (name, value, plain[name])


@pytest.mark.gpu_interpreter
def test_padding_may_hold_anything_and_runs_repeat():
    """NaN in x and both gates at padding changes no bit of outputs, state and gradients; a second run gives the same
    bits."""
    given, fixed = short_arguments(12, segments="ragged", b=1)
    hole = (fixed["segment_ids"] == 0)[..., None]
    poisoned = given | {name: jnp.where(hole, jnp.nan, given[name]) for name in ("x", "in_gate", "out_gate")}
    run = measured(functools.partial(short, activation="silu", return_state=True), fixed)
    with dispatch.interpreted():
        clean, again, dirty = run(given), run(given), run(poisoned)
    for a, b, c in zip(*(jax.tree.leaves(part) for part in (clean, again, dirty)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.gpu_interpreter
def test_states_join_cuts():
    given, _ = short_arguments(37, b=1)
    how = {"taps": given["taps"], "bias": given["bias"], "activation": "silu", "return_state": True}

    def part(tokens, state):
        return short(
            **{name: given[name][:, tokens] for name in ("x", "in_gate", "out_gate")}, **how, initial_state=state
        )

    with dispatch.interpreted():
        whole, last = part(slice(None), given["initial_state"])
        first, state = part(slice(18), given["initial_state"])
        second, final = part(slice(18, None), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(final, last)


def test_what_kernels_refuse():
    x = jnp.zeros((1, 4, 2), jnp.bfloat16)
    assert "8 taps" in str(gpu.refuses(x, jnp.zeros((9, 2))))
    assert "float16" in str(gpu.refuses(x.astype(jnp.float16), jnp.zeros((3, 2))))
    assert "x's dtype; out_gate is float32" in str(gpu.refuses(x, jnp.zeros((3, 2)), out_gate=jnp.zeros((1, 4, 2))))
    assert "bfloat16; this is float32" in str(gpu_long.refuses(x.astype(jnp.float32), jnp.zeros((4, 2))))
    assert "4096" in str(gpu_long.refuses(jnp.zeros((1, 4097, 1), jnp.bfloat16), jnp.zeros((5, 1))))
    assert "segments" in str(gpu_long.refuses(x, jnp.zeros((4, 2)), segment_ids=jnp.ones((1, 4), jnp.int32)))
