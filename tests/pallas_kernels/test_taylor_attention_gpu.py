"""Taylor attention's GPU kernels, simulated with race detection: values and all gradients against the specification
in fp64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.taylor_attention import gpu, gpu_body, kernels
from recollect.pallas_kernels.taylor_attention.features import count, packed
from recollect.pallas_kernels.tuning import forced
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.taylor_sums import (
    arguments,
    cuts_are_joined,
    error,
    exactly,
    halved,
    padding_is_inert,
    results,
    taylor_attention,
)

kernel = functools.partial(taylor_attention, backend="pallas_gpu")
ONE = {"b": 1, "h": 1, "hk": 1}

CASES = [
    # t, state, segments, normalise, state returned, sizes; spans: of time
    (1, True, True, True, True, {**ONE, "b": 2, "k": 16, "v": 64}),
    (63, False, False, True, False, {**ONE, "k": 16, "v": 64}),
    (130, True, True, True, True, {**ONE, "k": 8, "v": 72}),
    (257, True, True, True, True, {**ONE, "k": 8, "v": 64, "spans": 3}),  # 2, 2 and 1 chunks
    pytest.param((256, False, False, False, False, {**ONE, "k": 16, "v": 64, "spans": 2}), marks=pytest.mark.wide),
    pytest.param((128, True, False, False, True, {**ONE, "k": 16, "v": 32}), marks=pytest.mark.wide),
    pytest.param((257, True, True, True, True, {"h": 4, "k": 16, "v": 32}), marks=pytest.mark.wide),
    pytest.param((257, False, True, False, False, {"k": 16, "v": 130}), marks=pytest.mark.wide),
    pytest.param((1000, True, True, True, True, {**ONE, "k": 16, "v": 64}), marks=pytest.mark.wide),
]


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_sum(case):
    t, with_state, with_segments, normalise, return_state, sizes = case
    spans = sizes.get("spans", 1)
    sizes = {name: size for name, size in sizes.items() if name != "spans"}
    inputs, fixed = arguments(t, with_state, with_segments, normalise, **sizes)
    inputs = halved(inputs)
    how = {"scale": 0.3, "normalise": normalise, "return_state": return_state}
    with dispatch.interpreted("races"), forced(**{"taylor_attention.gpu_spans": {"spans": spans}}):
        (o, state), gradients = results(functools.partial(kernel, **how), inputs, fixed)
        assert not races_found()
    (o_, state_), gradients_ = exactly(functools.partial(taylor_attention, **how, backend="reference"), inputs, fixed)
    (plain, _), plain_gradients = results(functools.partial(taylor_attention, **how, backend="xla"), inputs, fixed)
    assert o.dtype == jnp.bfloat16 and error(o, o_) < min(0.005, max(0.003, 2 * error(plain, o_)))
    assert (state is None) == (not return_state)
    if return_state:
        assert state.dtype == jnp.float32 and error(state, state_) < 0.005
    for name in gradients_:
        # Features and states are rounded to bf16 before products, which xla leaves in fp32: of one token's
        # dq, which comes from the state alone, that shows (0.004 against 0.0016), hence the floor.
        allowed = min(0.01, max(0.005, 2 * error(plain_gradients[name], gradients_[name])))
        assert gradients[name].dtype == inputs[name].dtype and error(gradients[name], gradients_[name]) < allowed, name


@pytest.mark.gpu_interpreter
def test_padding_full_of_nan_touches_nothing():
    inputs, fixed = arguments(70, True, True, **ONE)

    def run(q, k, v, initial_state, **fixed):
        return kernel(
            *(x.astype(jnp.bfloat16) for x in (q, k, v)),
            initial_state=initial_state,
            **fixed,
            return_state=True,
            epsilon=0.0,
        )

    with dispatch.interpreted():
        padding_is_inert(run, inputs, fixed)


@pytest.mark.gpu_interpreter
def test_two_calls_are_one():
    inputs, fixed = arguments(100, True, True, **ONE)
    with dispatch.interpreted():
        cuts_are_joined(jax.jit(functools.partial(kernel, return_state=True)), (halved(inputs), fixed), (50,), 0.005)


@pytest.mark.gpu_interpreter
def test_the_same_bits_twice():
    inputs, _ = arguments(70, False, False, **ONE)
    inputs = halved(inputs)
    gradient = jax.jit(
        jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(kernel(q, k, v)[0].astype(jnp.float32))), (0, 1, 2))
    )
    with dispatch.interpreted():
        first, second = gradient(*inputs.values()), gradient(*inputs.values())
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_long_sequences_fill_the_device(monkeypatch):
    launched = []

    def launch(plan, inputs):
        launched.append(plan)
        return {name: jnp.zeros(made.shape, made.dtype) for name, made in plan.results().items()}

    monkeypatch.setattr(gpu_body, "launch", launch)
    key, value = (jax.ShapeDtypeStruct((2, 8192, 16, size), jnp.bfloat16) for size in (16, 64))
    with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        jax.eval_shape(lambda q, k, v, do: jax.vjp(lambda *x: kernel(*x)[0], q, k, v)[1](do), key, key, value, value)
    scans = ["key_states", "forward", "key_states", "queries", "query_states", "keys_values"]
    assert [plan.scan for plan in launched] == scans
    assert all(plan.splits * plan.heads * plan.b * plan.spans == 128 for plan in launched)


@pytest.mark.parametrize("with_segments", [False, True])
def test_what_comes_from_before_a_chunk(with_segments):
    """The sums of weights out of moments are those out of packed features, and so is the normaliser they leave."""
    t, k = 192, 5
    inputs, fixed = arguments(t, True, with_segments, k=k)
    segments = np.ones((2, t), np.int32) if not with_segments else fixed["segment_ids"]
    first = np.ones(2, np.int32) if not with_segments else fixed["initial_segment"]
    marks = kernels._marks(jnp.asarray(segments), jnp.asarray(first), 64) if with_segments else None
    normaliser = inputs["initial_state"][..., -1]
    settings = kernels.TaylorSettings(scale=0.3, normalise=True, epsilon=0.0, chunk=64, return_state=True)
    sums, last = jax.jit(lambda q, k, z: gpu._between(q, k, z, marks, settings))(inputs["q"], inputs["k"], normaliser)
    assert last.shape == (2, 2, count(k))
    current, expected = np.array(first), np.zeros((2, 2, t))
    phi_q, phi_k = (np.asarray(packed(jnp.asarray(x))) for x in (inputs["q"] * 0.3 * k**0.5, inputs["k"]))
    state = np.array(normaliser, np.float64)
    for row in range(2):
        for chunk in range(0, t, 64):
            entered, entering = state[row].copy(), current[row]
            for i in range(chunk, chunk + 64):
                segment = segments[row, i]
                if segment == 0:
                    continue
                if segment != current[row]:
                    state[row], current[row] = 0, segment
                state[row] += phi_k[row, i]
                if segment == entering:
                    expected[row, :, i] = np.sum(phi_q[row, i] * entered, axis=-1)
    real = (segments != 0)[:, None]
    assert error(np.where(real, sums, 0), expected) < 1e-5 and error(last, state) < 1e-5


@pytest.mark.parametrize(
    ("k", "v", "dtype", "reason"),
    [
        (17, 64, jnp.bfloat16, "at most 16 key dimensions"),
        (16, 300, jnp.bfloat16, "at most 256 value dimensions; got 300"),
        (16, 64, jnp.float32, "its products take bfloat16; q is float32"),
    ],
)
def test_what_it_refuses_it_explains(k, v, dtype, reason):
    q = jax.ShapeDtypeStruct((1, 64, 2, k), dtype)
    with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        with pytest.raises(ValueError, match=f"pallas_gpu cannot serve this call: .*{reason}"):
            jax.eval_shape(kernel, q, q, jax.ShapeDtypeStruct((1, 64, 2, v), dtype))
        with dispatch.recorded_choices() as choices:
            jax.eval_shape(taylor_attention, q, q, jax.ShapeDtypeStruct((1, 64, 2, v), dtype))
    assert choices[0].backend == "xla"
