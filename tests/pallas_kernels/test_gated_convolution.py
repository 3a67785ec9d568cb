"""Short and long convolutions: xla = reference = an independent numpy sum, with gates, segments, padding and states.

What the tests of the kernels (test_gated_convolution_tpu.py, _gpu.py) share stands here too.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.gated_convolution import (
    long_convolution,
    reference,
    short_convolution,
    short_convolution_step,
)

TOLERANCE = 2e-6  # fp32 sums of up to a few hundred terms; a Fourier transform of 514 points measures 3e-7


def error(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ragged_segments(seed, b, t):
    """Documents of about 15 tokens, a fifth of the positions padding, wherever."""
    random = np.random.default_rng(seed)
    segments = 1 + np.cumsum(random.random((b, t)) < 1 / 15, axis=1)
    segments[random.random((b, t)) < 0.2] = 0
    return jnp.asarray(segments, jnp.int32)


def by_hand(x, taps, segments=None):
    """float64, one output at a time."""
    x, taps = np.asarray(x, np.float64), np.asarray(taps, np.float64)
    segments = np.ones(x.shape[:2], int) if segments is None else np.asarray(segments)
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
        for segment in set(segments[row]) - {0}:
            places = np.flatnonzero(segments[row] == segment)
            for n, place in enumerate(places):
                lags = range(min(n + 1, len(taps)))
                y[row, place] = sum(taps[lag] * x[row, places[n - lag]] for lag in lags)
    return y


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("t", [1, 37])
def test_values_by_hand(backend, segmented, t):
    x, taps, filter = normal(0, 2, t, 3), normal(1, 4, 3), normal(2, 50, 3)
    segments = ragged_segments(3, 2, t) if segmented and t > 1 else (jnp.array([[5], [0]]) if segmented else None)
    y, state = short_convolution(x, taps, segment_ids=segments, backend=backend)
    assert state is None
    assert error(y, by_hand(x, taps, segments)) < TOLERANCE
    long = jax.jit(lambda x: long_convolution(x, filter, segment_ids=segments, backend=backend))
    assert error(long(x), by_hand(x, filter, segments)) < TOLERANCE


def test_first_tap_is_the_current_token():
    x = jnp.array([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    y, _ = short_convolution(x, jnp.array([[1.0], [2.0]]), jnp.array([1000.0]))
    assert y.ravel().tolist() == [1001.0, 1012.0, 1120.0]


def packed_segments(seed, b, t):
    """Documents of about 15 tokens without holes, the last tenth padding."""
    random = np.random.default_rng(seed)
    segments = 1 + np.cumsum(random.random((b, t)) < 1 / 15, axis=1)
    segments[:, t - t // 10 :] = 0
    return jnp.asarray(segments, jnp.int32)


def short_arguments(t, *, b=2, d=5, taps=4, gates="in out", bias=True, state=True, segments="", dtype=jnp.float32):
    """Arrays to differentiate by, and those that are not."""
    given = {"x": normal(0, b, t, d).astype(dtype), "taps": normal(1, taps, d)}
    given |= {name + "_gate": normal(seed, b, t, d).astype(dtype) for seed, name in enumerate(gates.split(), start=2)}
    given |= {"bias": normal(4, d)} if bias else {}
    given |= {"initial_state": normal(5, b, taps - 1, d)} if state else {}
    fixed = {}
    if segments:
        fixed["segment_ids"] = {"packed": packed_segments, "ragged": ragged_segments}[segments](t, b, t)
        # The first row's document goes on, the others' are over.
        fixed["initial_segment"] = fixed["segment_ids"][:, 0].at[1:].set(999)
    return given, fixed


def long_arguments(t, *, b=2, d=3, length=None, gates="in out", skip=True, dtype=jnp.float32):
    """As `short_arguments`."""
    length = t if length is None else length
    given = {
        "x": normal(0, b, t, d).astype(dtype),
        "filter": normal(1, length, d) * jnp.exp(-jnp.arange(length) / 50)[:, None],
    }
    given |= {name + "_gate": normal(seed, b, t, d).astype(dtype) for seed, name in enumerate(gates.split(), start=2)}
    return given | ({"skip": normal(4, d)} if skip else {}), {}


def results(run, given, fixed):
    """Outputs, a tuple, and the gradients of what is given for a random cotangent of each."""
    return measured(run, fixed)(given)


def measured(run, fixed):
    """`results` as a compiled function of what is given."""

    def outputs_of(given):
        outputs = run(**given, **fixed)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y for y in outputs if y is not None)

    def total(given):
        outputs = outputs_of(given)
        return sum(jnp.sum(y * normal(90 + n, *y.shape)) for n, y in enumerate(outputs)), outputs

    def outputs_and_gradients(given):
        gradients, outputs = jax.grad(total, has_aux=True)(given)
        return outputs, gradients

    return jax.jit(outputs_and_gradients)


def exactly(run, given, fixed):
    """`results` of a specification in fp64."""
    with jax.enable_x64(True):
        given = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in given.items()}
        return jax.tree.map(np.asarray, results(run, given, fixed))


exact_short = functools.partial(
    reference.short_convolution,
    bias=None,
    in_gate=None,
    out_gate=None,
    initial_state=None,
    segment_ids=None,
    initial_segment=None,
)


def exact_long(x, filter, in_gate=1.0, out_gate=1.0, skip=0.0, segment_ids=None):
    y = out_gate * (skip * in_gate * x + reference.long_convolution(in_gate * x, filter, segment_ids=segment_ids))
    return y if segment_ids is None else jnp.where((segment_ids != 0)[..., None], y, 0)


def errors(found, expected):
    """Relative rms of each output and gradient by name; absolute where 0 is expected."""
    names = [*(f"output {n}" for n in range(len(expected[0]))), *expected[1]]
    pairs = zip(names, [*found[0], *found[1].values()], [*expected[0], *expected[1].values()], strict=True)
    return {
        name: error(got, wanted) if np.any(wanted) else float(np.max(np.abs(got), initial=0.0))
        for name, got, wanted in pairs
    }


def compare(found, expected, close):
    """Every output and gradient within `close` of what is expected."""
    measured = errors(found, expected)
    assert all(value < close for value in measured.values()), measured


SHORT_CASES = [
    # t, activation, state returned, what else
    (1, "silu", True, {"d": 3}),
    (63, "silu", True, {"segments": "packed", "taps": 3}),
    (257, "none", True, {"segments": "ragged", "gates": "in", "b": 1}),
    (257, "silu", False, {"d": 130, "bias": False, "state": False, "gates": "", "b": 1}),
    (40, "none", True, {"taps": 1, "segments": "ragged"}),
    pytest.param((1000, "silu", True, {"segments": "ragged", "taps": 8, "b": 1}), marks=pytest.mark.wide),
    pytest.param((1000, "silu", False, {"segments": "packed", "taps": 2, "d": 7}), marks=pytest.mark.wide),
    pytest.param((300, "none", True, {"taps": 8, "gates": "", "d": 260}), marks=pytest.mark.wide),
]
MANY_TAPS = [
    (150, "silu", True, {"taps": 90, "b": 1}),
    pytest.param((37, "none", False, {"taps": 60, "state": False, "gates": ""}), marks=pytest.mark.more),
    pytest.param((150, "none", True, {"taps": 40, "segments": "ragged"}), marks=pytest.mark.more),
]
LONG_CASES = [
    # t, what else
    (1, {}),
    (63, {"length": 80, "gates": ""}),
    (257, {"length": 100, "d": 5}),
    pytest.param((1000, {"b": 3}), marks=pytest.mark.wide),
    pytest.param((130, {"b": 20, "gates": "in", "skip": False}), marks=pytest.mark.wide),
]


@pytest.mark.parametrize("case", SHORT_CASES + MANY_TAPS, ids=str)
def test_short_xla_is_the_sum(case):
    t, activation, return_state, sizes = case
    given, fixed = short_arguments(t, **sizes)
    how = {"activation": activation, "return_state": return_state}
    found = results(functools.partial(short_convolution, backend="xla", **how), given, fixed)
    compare(found, exactly(functools.partial(exact_short, **how), given, fixed), 1e-5)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
@pytest.mark.parametrize("aim", ["cpu", "tpu"])
def test_long_xla_is_the_sum(case, aim):
    """Aimed at a TPU, xla multiplies by blocks instead of transforming."""
    t, sizes = case
    given, fixed = long_arguments(t, **sizes)
    with dispatch.aimed_at(aim, "any"):
        found = results(functools.partial(long_convolution, backend="xla"), given, fixed)
    compare(found, exactly(exact_long, given, fixed), 1e-5)


def test_a_step_is_a_convolution_of_one_token():
    given, _ = short_arguments(12, dtype=jnp.bfloat16)
    whole, last = short_convolution(**given, activation="silu", return_state=True)
    state, outputs = given["initial_state"], []
    step = jax.jit(functools.partial(short_convolution_step, activation="silu"))
    for i in range(12):
        tokens = {name: given[name][:, i] for name in ("x", "in_gate", "out_gate")}
        y, state = step(state, **tokens, taps=given["taps"], bias=given["bias"])
        outputs.append(y)
    assert outputs[0].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(state, last)
    assert error(jnp.stack(outputs, axis=1), whole) < 1e-3  # an fp32 sum in another order may round to the next bf16
    with pytest.raises(ValueError, match=r"short_convolution_step: x must be \(b, d\)"):
        inspect.unwrap(short_convolution_step)(state, given["x"], given["taps"])


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@drawn(
    t=st.sampled_from([1, 2, 5, 33]),
    d=st.integers(1, 4),
    taps=st.integers(1, 6),
    gates=st.sampled_from(["", "in", "out", "in out"]),
    bias=st.booleans(),
    state=st.booleans(),
    segments=st.sampled_from(["", "packed", "ragged"]),
    activation=st.sampled_from(["none", "silu"]),
    return_state=st.booleans(),
)
def test_short_xla_is_the_sum_in_any_setting(t, activation, return_state, **sizes):
    given, fixed = short_arguments(t, **sizes)
    how = {"activation": activation, "return_state": return_state}
    found = results(functools.partial(short_convolution, backend="xla", **how), given, fixed)
    compare(found, exactly(functools.partial(exact_short, **how), given, fixed), 1e-5)


@pytest.mark.parametrize(
    ("t", "length"), [(1, "long"), (64, "short"), pytest.param(65, "long", marks=pytest.mark.wide), (257, "short")]
)
def test_long_xla_equals_reference_with_segments(t, length):
    b, d = 2, 3
    filter = normal(1, max(1, t // 3) if length == "short" else t + 5, d)
    segments = ragged_segments(t, b, t)
    cotangent = normal(9, b, t, d)

    def run(backend, x, filter):
        y = long_convolution(x, filter, segment_ids=segments, backend=backend)
        return jnp.sum(y * cotangent), y

    results = {
        name: jax.jit(jax.value_and_grad(lambda *a, name=name: run(name, *a), argnums=(0, 1), has_aux=True))(
            normal(0, b, t, d), filter
        )
        for name in ("xla", "reference")
    }
    for got, wanted in zip(jax.tree.leaves(results["xla"][1:]), jax.tree.leaves(results["reference"][1:]), strict=True):
        assert error(got, wanted) < TOLERANCE
    assert abs(results["xla"][0][0] - results["reference"][0][0]) < TOLERANCE * jnp.linalg.norm(
        cotangent
    ) * jnp.linalg.norm(results["xla"][0][1])


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_state_hands_over_across_padding_and_documents(backend, kernel):
    """Chunks of a row with padding sprinkled in, against the row in one go; the state itself against the inputs."""
    b, t, d = 3, 60, 2
    x, taps, segments = normal(0, b, t, d), normal(1, kernel, d), ragged_segments(4, b, t)
    whole = by_hand(x, taps, segments)
    state, segment, out = jnp.zeros((b, kernel - 1, d)), jnp.zeros(b, jnp.int32), []

    @jax.jit
    def run(x, state, segments, segment):
        return short_convolution(
            x,
            taps,
            initial_state=state,
            segment_ids=segments,
            initial_segment=segment,
            return_state=True,
            backend=backend,
        )

    for start in range(0, t, 10):
        part = segments[:, start : start + 10]
        y, state = run(jnp.where((part == 0)[..., None], jnp.nan, x[:, start : start + 10]), state, part, segment)
        out.append(y)
        for row in range(b):
            seen = np.asarray(segments)[row, : start + 10]
            places = np.flatnonzero(seen)
            if len(places):
                segment = segment.at[row].set(seen[places[-1]])
                newest = np.flatnonzero(seen == seen[places[-1]])[-(kernel - 1) :] if kernel > 1 else []
                wanted = np.zeros((kernel - 1, d))
                if len(newest):
                    wanted[-len(newest) :] = np.asarray(x[row])[newest]
                np.testing.assert_array_equal(state[row], wanted.astype(np.float32))
    assert error(jnp.concatenate(out, axis=1), whole) < TOLERANCE


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@drawn(
    t=st.sampled_from([1, 7, 40, 70]),
    d=st.integers(1, 4),
    length=st.sampled_from([1, 30, 100]),
    gates=st.sampled_from(["", "in", "out", "in out"]),
    skip=st.booleans(),
    segments=st.booleans(),
    aim=st.sampled_from(["cpu", "tpu"]),
)
def test_long_xla_is_the_sum_in_any_setting(t, segments, aim, **sizes):
    given, fixed = long_arguments(t, **sizes)
    fixed |= {"segment_ids": ragged_segments(t, 2, t)} if segments else {}
    with dispatch.aimed_at(aim, "any"):
        found = results(functools.partial(long_convolution, backend="xla"), given, fixed)
    compare(found, exactly(exact_long, given, fixed), 1e-5)


def test_padding_is_nowhere():
    """NaN in padding reaches no output and no gradient, and moving padding moves nothing but itself."""
    x, taps, filter, segments = normal(0, 2, 40, 3), normal(1, 3, 3), normal(2, 40, 3), ragged_segments(5, 2, 40)
    poisoned = jnp.where((segments == 0)[..., None], jnp.nan, x)

    def total(x, taps, filter):
        y, _ = short_convolution(x, taps, segment_ids=segments)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(long_convolution(x, filter, segment_ids=segments)))

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    clean, dirty = (run(value, taps, filter) for value in (x, poisoned))
    for got, wanted in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_causal_and_apart_bit_for_bit():
    x, filter = normal(0, 1, 200, 2), normal(1, 200, 2)
    segments = jnp.where(jnp.arange(200) < 90, 1, 2)[None]
    run = jax.jit(lambda x: long_convolution(x, filter, segment_ids=segments))
    later, other = x.at[:, 150:].add(1e3), x.at[:, :90].add(1e3)
    np.testing.assert_array_equal(run(later)[:, :150], run(x)[:, :150])
    np.testing.assert_array_equal(run(other)[:, 90:], run(x)[:, 90:])


def test_bfloat16_sums_in_float32():
    x, taps, filter = normal(0, 2, 100, 4).astype(jnp.bfloat16), normal(1, 4, 4), normal(2, 100, 4)
    for y, wanted in (
        (short_convolution(x, taps)[0], by_hand(x, taps)),
        (long_convolution(x, filter), by_hand(x, filter)),
    ):
        assert y.dtype == jnp.bfloat16
        assert error(y, wanted) < 2.0**-9  # rounding the result once: at most half of 2^-8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": jnp.zeros((2, 4))}),
        ("taps", {"taps": jnp.zeros((3, 6))}),
        ("bias", {"bias": jnp.zeros(4)}),
        ("initial_state", {"initial_state": jnp.zeros((2, 3, 5))}),
        ("segment_ids", {"segment_ids": jnp.ones((2, 3), jnp.int32)}),
        ("initial_segment", {"initial_state": jnp.zeros((2, 2, 5)), "segment_ids": jnp.ones((2, 4), jnp.int32)}),
        ("in_gate", {"in_gate": jnp.zeros((2, 4, 1))}),
        ("out_gate", {"out_gate": jnp.zeros((2, 3, 5))}),
        ("activation", {"activation": "relu"}),
        ("backend", {"backend": "pallas_tpu"}),
    ],
)
def test_wrong_arguments_are_named(name, change):
    arguments = {"x": jnp.zeros((2, 4, 5)), "taps": jnp.zeros((3, 5)), "bias": None} | change
    with pytest.raises(ValueError, match=name if name != "backend" else "pallas_tpu"):
        inspect.unwrap(short_convolution)(arguments.pop("x"), arguments.pop("taps"), arguments.pop("bias"), **arguments)


def test_wrong_filter_is_named():
    with pytest.raises(ValueError, match="filter"):
        inspect.unwrap(long_convolution)(jnp.zeros((2, 4, 5)), jnp.zeros((4, 6)))
