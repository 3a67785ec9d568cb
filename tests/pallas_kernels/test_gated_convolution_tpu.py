"""The convolutions' TPU kernels, simulated: values and all gradients against the specification in fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.gated_convolution import long_convolution, short_convolution, tpu, tpu_long
from tests.pallas_kernels.test_gated_convolution import (
    LONG_CASES,
    SHORT_CASES,
    compare,
    error,
    errors,
    exact_long,
    exact_short,
    exactly,
    long_arguments,
    measured,
    normal,
    ragged_segments,
    results,
    short_arguments,
)

CLOSE = 1e-4
short = functools.partial(short_convolution, backend="pallas_tpu")
long = functools.partial(long_convolution, backend="pallas_tpu")


def races_found() -> bool:
    """Whether the simulator's last kernels raced; it only prints it, and the flag is internal."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("case", SHORT_CASES, ids=str)
def test_short_kernels_are_the_sum(case):
    t, activation, return_state, sizes = case
    given, fixed = short_arguments(t, **sizes)
    how = {"activation": activation, "return_state": return_state}
    races = t == 257
    with dispatch.interpreted("races" if races else "values"):
        found = results(functools.partial(short, **how), given, fixed)
    compare(found, exactly(functools.partial(exact_short, **how), given, fixed), CLOSE)
    assert not (races and races_found())


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_kernels_are_the_sum(case):
    t, sizes = case
    given, fixed = long_arguments(t, **sizes)
    races = t == 257
    with dispatch.interpreted("races" if races else "values"):
        found = results(long, given, fixed)
    compare(found, exactly(exact_long, given, fixed), CLOSE)
    assert not (races and races_found())


@pytest.mark.parametrize("which", ["short", "long"])
def test_half_precision_is_near_xla(which):
    if which == "short":
        given, fixed = short_arguments(130, dtype=jnp.bfloat16)
        run = functools.partial(short_convolution, activation="silu", return_state=True)
        exact = functools.partial(exact_short, activation="silu", return_state=True)
    else:
        (given, fixed), run, exact = long_arguments(130, dtype=jnp.bfloat16), long_convolution, exact_long
    with dispatch.interpreted():
        found = results(functools.partial(run, backend="pallas_tpu"), given, fixed)
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


def test_padding_may_hold_anything_and_runs_repeat():
    """NaN in x and both gates at padding changes no bit of outputs, state and gradients; a second run gives the same
    bits."""
    given, fixed = short_arguments(63, segments="ragged")
    hole = (fixed["segment_ids"] == 0)[..., None]
    poisoned = given | {name: jnp.where(hole, jnp.nan, given[name]) for name in ("x", "in_gate", "out_gate")}
    run = measured(functools.partial(short, activation="silu", return_state=True), fixed)
    with dispatch.interpreted():
        clean, again, dirty = run(given), run(given), run(poisoned)
    for a, b, c in zip(*(jax.tree.leaves(part) for part in (clean, again, dirty)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("cut", [40, pytest.param(1, marks=pytest.mark.wide)])
def test_states_join_cuts(cut):
    given, fixed = short_arguments(63, segments="ragged")
    how = {"taps": given["taps"], "bias": given["bias"], "activation": "silu", "return_state": True}

    def part(tokens, state, owner):
        arrays = {name: given[name][:, tokens] for name in ("x", "in_gate", "out_gate")}
        arrays |= {"initial_state": state, "segment_ids": fixed["segment_ids"][:, tokens], "initial_segment": owner}
        return jax.jit(lambda arrays: short(**arrays, **how))(arrays)

    segments = np.asarray(fixed["segment_ids"])
    owners = np.asarray(fixed["initial_segment"]).copy()
    for row in range(len(segments)):
        seen = segments[row, :cut][segments[row, :cut] != 0]
        owners[row] = seen[-1] if len(seen) else owners[row]
    with dispatch.interpreted():
        whole, last = part(slice(None), given["initial_state"], fixed["initial_segment"])
        first, state = part(slice(cut), given["initial_state"], fixed["initial_segment"])
        second, final = part(slice(cut, None), state, jnp.asarray(owners))
    assert error(jnp.concatenate([first, second], axis=1), whole) < 1e-6
    np.testing.assert_array_equal(final, last)


def test_long_is_causal_and_repeats():
    given, _ = long_arguments(200, gates="")
    changed = given | {"x": given["x"].at[:, 150:].add(1e3)}
    run = measured(long, {})
    with dispatch.interpreted():
        one, two, three = (run(arrays)[0][0] for arrays in (given, given, changed))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[:, :150], three[:, :150])


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@drawn(
    t=st.sampled_from([2, 70]),
    d=st.integers(1, 4),
    taps=st.integers(1, 8),
    gates=st.sampled_from(["", "in", "out"]),
    bias=st.booleans(),
    state=st.booleans(),
    segments=st.sampled_from(["", "packed", "ragged"]),
    activation=st.sampled_from(["none", "silu"]),
    return_state=st.booleans(),
)
def test_short_kernels_are_the_sum_in_any_setting(t, activation, return_state, **sizes):
    test_short_kernels_are_the_sum((t, activation, return_state, sizes))


def test_each_device_of_a_mesh_convolves_its_part():
    given, fixed = short_arguments(20, b=4, d=6, gates="out")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    run = functools.partial(short, return_state=True)
    with dispatch.interpreted():
        alone = results(run, given, fixed), long(given["x"], normal(1, 20, 6))
        with jax.set_mesh(mesh):
            together = results(run, given, fixed), jax.jit(long)(given["x"], normal(1, 20, 6))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert error(one, other) < 1e-6


def test_rotated_rows():
    """The strided rotation that kernels build matrices by, and the one that stands for it where they are simulated."""
    rows = normal(0, 8, 16)
    wanted = np.stack([np.roll(row, j) for j, row in enumerate(np.asarray(rows))])
    with dispatch.interpreted():
        np.testing.assert_array_equal(tpu_long.rotate_rows(rows), wanted)

    def kernel(x, y):
        y[...] = pltpu.roll(x[...], 0, 1, stride=1, stride_axis=0)

    transposed = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype), interpret=True)(rows)
    np.testing.assert_array_equal(transposed, wanted)


def test_what_kernels_refuse():
    x = jnp.zeros((1, 4, 2))
    assert "8 taps" in str(tpu.refuses(x, jnp.zeros((9, 2))))
    assert "float16" in str(tpu.refuses(x.astype(jnp.float16), jnp.zeros((3, 2))))
    assert "4096" in str(tpu_long.refuses(jnp.zeros((1, 4097, 1)), jnp.zeros((5, 1))))
    assert "segments" in str(tpu_long.refuses(x, jnp.zeros((4, 2)), segment_ids=ragged_segments(0, 1, 4)))
    with (
        dispatch.interpreted(),
        pytest.raises(ValueError, match="pallas_tpu cannot serve this call: it has up to 8 taps"),
    ):
        short(x, jnp.zeros((9, 2)))
