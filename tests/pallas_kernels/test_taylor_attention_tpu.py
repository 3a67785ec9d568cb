"""Taylor attention's TPU kernels, simulated: values and all gradients against the specification in fp64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.taylor_attention import tpu_scan
from tests.pallas_kernels.taylor_sums import (
    arguments,
    by_loops,
    compare,
    cuts_are_joined,
    error,
    exactly,
    halved,
    padding_is_inert,
    results,
    taylor_attention,
)
from tests.pallas_kernels.test_taylor_attention import any_segments

CLOSE = 1e-4
kernel = functools.partial(taylor_attention, backend="pallas_tpu")

CASES = [
    # t, state, segments, normalise, state returned, sizes, simulation
    (1, True, True, True, True, {"b": 1}, "values"),
    (63, True, True, False, True, {}, "values"),
    (257, True, True, True, True, {"k": 7, "v": 9, "hk": 1}, "races"),
    (256, False, False, True, False, {"k": 8, "v": 32}, "values"),
    pytest.param((257, False, True, False, True, {}, "races"), marks=pytest.mark.wide),
    pytest.param((1000, True, True, True, True, {"k": 16, "v": 32}, "values"), marks=pytest.mark.wide),
    # Two groups of heads: blocks of 128 and 256 lanes.
    pytest.param(
        (130, True, True, True, True, {"k": 16, "v": 32, "h": 16, "hk": 16, "b": 1}, "values"), marks=pytest.mark.wide
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_are_the_sum(case):
    t, with_state, with_segments, normalise, return_state, sizes, how = case
    inputs, fixed = arguments(t, with_state, with_segments, normalise, **sizes)
    settings_ = {"scale": 0.3, "normalise": normalise, "return_state": return_state}
    with dispatch.interpreted(how):
        found = results(functools.partial(kernel, **settings_), inputs, fixed)
    compare(found, exactly(functools.partial(taylor_attention, **settings_, backend="reference"), inputs, fixed), CLOSE)
    if how == "races":
        assert not races_found()


def races_found() -> bool:
    """Whether the simulator's last kernels raced; it only prints it, and the flag is internal."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def test_half_precision_is_as_close_as_xla():
    inputs, fixed = arguments(257, True, True, k=16, v=32, b=1, h=1, hk=1)
    inputs = halved(inputs)
    run = functools.partial(taylor_attention, return_state=True)
    with dispatch.interpreted():
        (o, state), gradients = results(functools.partial(run, backend="pallas_tpu"), inputs, fixed)
    (o_, state_), gradients_ = exactly(
        functools.partial(taylor_attention, scale=0.25, return_state=True, backend="reference"), inputs, fixed
    )
    (plain, _), plain_gradients = results(functools.partial(run, backend="xla"), inputs, fixed)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(o, o_) < min(0.005, 2 * error(plain, o_)) and error(state, state_) < 0.005
    for name in gradients_:
        assert gradients[name].dtype == inputs[name].dtype
        # Features and states are rounded to bf16 before products, which xla leaves in fp32: hence the floor.
        allowed = min(0.01, max(0.005, 2 * error(plain_gradients[name], gradients_[name])))
        assert error(gradients[name], gradients_[name]) < allowed, name


def test_padding_full_of_nan_touches_nothing():
    inputs, fixed = arguments(140, True, True, b=1, h=1, hk=1)
    with dispatch.interpreted():
        padding_is_inert(functools.partial(kernel, return_state=True, epsilon=0.0), inputs, fixed)


@pytest.mark.parametrize("with_segments", [pytest.param(False, marks=pytest.mark.wide), True])
def test_two_calls_are_one(with_segments):
    with dispatch.interpreted():
        run = jax.jit(functools.partial(kernel, return_state=True))
        cuts_are_joined(run, arguments(140, True, with_segments, h=1, hk=1), (40,), CLOSE)


def test_the_same_bits_twice():
    inputs, fixed = arguments(140, False, True, h=1, hk=1, b=1)
    gradient = jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(kernel(q, k, v, **fixed)[0])), (0, 1, 2)))
    with dispatch.interpreted():
        first, second = gradient(*inputs.values()), gradient(*inputs.values())
    jax.tree.map(np.testing.assert_array_equal, first, second)


@functools.cache
def _compiled():
    return jax.jit(functools.partial(kernel, return_state=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_and_states(data):
    t = data.draw(st.sampled_from([2, 11]))
    segments, first = any_segments(data, t)
    inputs, _ = arguments(t, True, False)
    inputs["q"] = data.draw(st.sampled_from([0.0, 0.1, 8.0])) * inputs["q"]
    fixed = {"segment_ids": segments, "initial_segment": first}
    with dispatch.interpreted():
        o, state = _compiled()(**inputs, **fixed)
    expected, expected_state = by_loops(**inputs, **fixed)
    assert error(o, expected) < CLOSE and error(state, expected_state) < CLOSE


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ({"k": 33}, jnp.float32, "at most 32 key dimensions; got 33"),
        ({}, jnp.float16, "all be bfloat16 or all float32; got float16"),
        ({"k": 32, "v": 256, "h": 8}, jnp.float32, "do not fit into VMEM"),
    ],
)
def test_what_it_refuses_it_explains(sizes, dtype, reason):
    k, v, h = (sizes.get(name, 4) for name in "kvh")
    q = jax.ShapeDtypeStruct((1, 256, h, k), dtype)
    with (
        dispatch.interpreted(),
        pytest.raises(ValueError, match=f"taylor_attention: pallas_tpu cannot serve this call: .*{reason}"),
    ):
        jax.eval_shape(kernel, q, q, jax.ShapeDtypeStruct((1, 256, h, v), dtype))


def test_heads_come_in_blocks_of_whole_lanes():
    groups = {
        shape: tpu_scan.TaylorShape.of(1, 256, *shape, 128).group
        for shape in [(16, 16, 64), (1, 16, 64), (12, 16, 64), (16, 8, 128), (32, 16, 64)]
    }
    assert groups == {(16, 16, 64): 8, (1, 16, 64): 1, (12, 16, 64): 12, (16, 8, 128): 16, (32, 16, 64): 8}


def test_chunks_are_of_whole_lanes_or_everything():
    assert [tpu_scan.chunk_of(*given) for given in [(1, None), (63, 16), (257, None), (257, 64), (1000, 200)]] == [
        16,
        64,
        128,
        128,
        256,
    ]


def test_each_device_of_a_mesh_takes_its_part():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    inputs, fixed = arguments(20, True, True)
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = functools.partial(kernel, scale=0.3, return_state=True)
        assert "shard_map" in str(jax.make_jaxpr(run)(**inputs, **fixed))
        placed = jax.device_put((inputs, fixed), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        found = results(run, *placed)
    compare(
        found,
        exactly(functools.partial(taylor_attention, scale=0.3, return_state=True, backend="reference"), inputs, fixed),
        CLOSE,
    )
