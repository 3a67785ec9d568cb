"""Kernels under a mesh: the same numbers as on one device, each device its part, gradients too, and compiled for a
slice of TPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recollect.pallas_kernels import compile_ahead, compilers, dispatch
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.sharding import over_mesh

AXES = ("data", "fsdp", "tensor", "sequence")


def mesh_of(devices=None, **sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    return jax.sharding.Mesh(
        np.array(devices[: int(np.prod(shape))]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 4
    )


def multiply(x, gain, shift):
    """(b, t, h, d), (b, hg, d), (h,) -> gain x + shift (b, t, h, d) and its sum over t (b, h, d). One kernel cell a
    sequence and head."""
    b, t, h, d = x.shape
    group = h // gain.shape[1]

    def kernel(x_ref, gain_ref, shift_ref, out_ref, sum_ref):
        out = x_ref[0, 0] * gain_ref[0, 0] + shift_ref[0]
        out_ref[0, 0] = out
        sum_ref[0, 0] = jnp.sum(out, axis=0, keepdims=True)

    whole = pl.BlockSpec((1, 1, t, d), lambda i, j: (i, j, 0, 0))
    row = pl.BlockSpec((1, 1, 1, d), lambda i, j: (i, j, 0, 0))
    grouped = pl.BlockSpec((1, 1, 1, d), lambda i, j: (i, jax.lax.div(j, group), 0, 0))
    per_head = pl.BlockSpec((1, 1, 1), lambda i, j: (j, 0, 0))
    shapes = [jax.ShapeDtypeStruct((b, h, t, d), x.dtype), jax.ShapeDtypeStruct((b, h, 1, d), x.dtype)]
    out, total = pl.pallas_call(
        kernel,
        grid=(b, h),
        in_specs=[whole, grouped, per_head],
        out_specs=[whole, row],
        out_shape=shapes,
        interpret=dispatch.interpretation() is not None,
    )(x.swapaxes(1, 2), gain[:, :, None], shift[:, None, None])
    return out.swapaxes(1, 2), total[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def operation(x, gain, shift=None, with_sum=True):
    seen.append(x.shape)
    out, total = multiply(x, gain, jnp.zeros(x.shape[2]) if shift is None else shift)
    return out, total if with_sum else None


def _forward(x, gain, shift, with_sum):
    return operation(x, gain, shift, with_sum), (x, gain, shift)


def _backward(with_sum, kept, cotangents):
    x, gain, shift = kept
    cotangent = cotangents[0] + (cotangents[1][:, None] if with_sum else 0)
    group = x.shape[2] // gain.shape[1]
    d_x, _ = multiply(cotangent, gain, jnp.zeros(x.shape[2]))
    d_gain = jnp.sum((cotangent * x).reshape(*x.shape[:2], gain.shape[1], group, x.shape[3]), axis=(1, 3))
    return d_x, d_gain, None if shift is None else jnp.sum(cotangent, axis=(0, 1, 3))


operation.defvjp(_forward, _backward)
seen = []
split = over_mesh(operation, {"x": "b t h d", "gain": "b h d", "shift": ("h", "b h")}, ("b t h d", "b h d"))


def inputs(b=8, t=6, h=4, hg=2, d=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (b, t, h, d)),
        jax.random.normal(keys[1], (b, hg, d)),
        jax.random.normal(keys[2], (h,)),
    )


def expected(x, gain, shift):
    out = x * jnp.repeat(gain, x.shape[2] // gain.shape[1], axis=1)[:, None] + shift[:, None]
    return out, jnp.sum(out, axis=1)


@pytest.mark.parametrize(
    ("sizes", "shape", "part"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, (2, 6, 2, 8)),
        ({"data": 8}, {}, (1, 6, 4, 8)),
        ({"data": 2, "fsdp": 4}, {"b": 2}, (1, 6, 4, 8)),  # fsdp does not divide: its devices repeat the work
        ({"data": 4, "fsdp": 2}, {"b": 2}, (1, 6, 4, 8)),  # data does not, fsdp does
        ({"tensor": 4}, {}, (8, 6, 4, 8)),  # nor 4 the 2 heads of gain
        ({"tensor": 4}, {"hg": 1}, (8, 6, 1, 8)),  # one head serves all
        ({"tensor": 2, "sequence": 4}, {}, (8, 6, 2, 8)),  # nothing splits over sequence
        ({"data": 3}, {}, (8, 6, 4, 8)),
    ],
)
def test_values_and_gradients_under_a_mesh(sizes, shape, part):
    arrays = inputs(**shape)
    mesh = mesh_of(**sizes)
    weights = tuple(jax.random.normal(jax.random.key(i), array.shape) for i, array in enumerate(expected(*arrays)))

    def values_and_gradients(function, *arrays):
        out, back = jax.vjp(function, *arrays)
        return out, back(weights)

    seen.clear()
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
        got = jax.jit(functools.partial(values_and_gradients, split))(*placed)
    assert part in seen
    wanted = jax.jit(functools.partial(values_and_gradients, expected))(*arrays)
    for found, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            found, right, rtol=2e-5, atol=2e-5
        )  # sums of up to 200 fp32 products in another order


def test_each_device_holds_its_part():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x, gain, shift = inputs()
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = (
            jax.device_put(x, rows),
            jax.device_put(gain, rows),
            jax.device_put(shift, NamedSharding(mesh, PartitionSpec())),
        )
        out, total = jax.jit(split)(*placed)
    assert out.addressable_shards[0].data.shape == (2, 6, 2, 8) and total.addressable_shards[0].data.shape == (2, 2, 8)


def test_a_populations_members_under_a_mesh():
    """vmap goes around it."""
    mesh = mesh_of(data=2, tensor=2)
    arrays = inputs()
    many = jax.tree.map(lambda array: jnp.stack([array, array + 1]), arrays)
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out, _ = jax.jit(jax.vmap(split))(*jax.device_put(many, NamedSharding(mesh, PartitionSpec())))
    np.testing.assert_allclose(out, jax.vmap(expected)(*many)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}])
def test_absent_arrays_and_settings_pass(sizes):
    x, gain, shift = inputs()
    mesh = mesh_of(**sizes)
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.device_put((x, gain), NamedSharding(mesh, PartitionSpec()))
        out, total = jax.jit(functools.partial(split, with_sum=False))(*placed)
    assert total is None
    np.testing.assert_allclose(out, expected(x, gain, 0 * shift)[0], rtol=1e-6)


def test_without_a_mesh_or_on_one_device_it_is_the_function():
    arrays = inputs()
    with dispatch.interpreted():
        assert "shard_map" not in str(jax.make_jaxpr(split)(*arrays))
        with jax.sharding.use_abstract_mesh(mesh_of().abstract_mesh):
            assert "shard_map" not in str(jax.make_jaxpr(split)(*arrays))
        with jax.sharding.use_abstract_mesh(mesh_of(data=2).abstract_mesh):
            assert "shard_map" in str(jax.make_jaxpr(split)(*arrays))


def test_inside_a_shard_map_it_is_the_function():
    """Whose caller split the arrays already."""
    mesh = mesh_of(data=8)
    x, gain, shift = inputs()
    rows = PartitionSpec(("data", "fsdp"))
    seen.clear()
    with dispatch.interpreted():
        out, _ = jax.shard_map(
            split, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=(rows, rows), check_vma=False
        )(x, gain, shift)
    assert set(seen) == {(1, 6, 4, 8)}
    np.testing.assert_allclose(out, expected(x, gain, shift)[0], rtol=1e-6, atol=1e-6)


def test_an_undeclared_rank_is_an_error_that_names_the_argument():
    x, gain, shift = inputs()
    with (
        jax.sharding.use_abstract_mesh(mesh_of(data=2).abstract_mesh),
        pytest.raises(ValueError, match=r"gain: has 2 dimensions; declared are \(b h d\)"),
    ):
        split(x, gain[0], shift)


def test_a_name_that_is_no_parameter_is_an_error():
    with pytest.raises(ValueError, match="operation has no parameters gian"):
        over_mesh(operation, {"x": "b t h d", "gian": "b h d"}, ("b t h d", "b h d"))


def test_it_compiles_for_a_slice_of_tpus_without_collectives():
    try:
        devices = compile_ahead.tpu_slice("v5e:2x2")
    except compilers.NotInstalled as error:
        pytest.skip(str(error))
    mesh = mesh_of(devices, data=2, tensor=2)
    specs = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor"), PartitionSpec("tensor")
    shapes = (8, 64, 4, 128), (8, 2, 128), (4,)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    with compile_ahead.aimed_at_devices(mesh):
        compiled = jax.jit(split).lower(*arrays).compile()
        with pytest.raises(Exception, match="cannot be automatically partitioned"):
            jax.jit(operation).lower(*arrays).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text and not re.search(r"all-(gather|reduce|to-all)|collective-permute", text)


def recurrence_gradients(q, k, v, log_decay, backend):
    def loss(q, k, v, log_decay):
        out, state = linear_recurrence(q, k, v, log_decay=log_decay, return_state=True, backend=backend)
        return jnp.sum(out**2) + jnp.sum(state**2)

    return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, log_decay)


def recurrence_shapes(b, t, h, k, v, dtype):
    return [(b, t, h // 2, k), (b, t, h // 2, k), (b, t, h, v), (b, t, h)], [dtype, dtype, dtype, jnp.float32]


def test_the_recurrence_under_a_mesh():
    """Its decay a token and head, its grouped keys, its state: declared as they are used."""
    shapes, _ = recurrence_shapes(4, 70, 4, 16, 16, jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v, g = (jax.random.normal(key, shape) / 4 for key, shape in zip(keys, shapes, strict=True))
    arrays = (q, k, v, -jnp.abs(g))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with dispatch.interpreted(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
        found = jax.jit(functools.partial(recurrence_gradients, backend="pallas_tpu"))(*placed)
    wanted = jax.jit(functools.partial(recurrence_gradients, backend="reference"))(*arrays)
    for one, two in zip(found, wanted, strict=True):
        assert jnp.sqrt(jnp.mean((one - two) ** 2) / jnp.mean(two**2)) <= 1e-4  # fp32, as without a mesh


def test_the_recurrence_compiles_for_a_slice_of_tpus_without_collectives():
    try:
        devices = compile_ahead.tpu_slice("v5e:2x2")
    except compilers.NotInstalled as error:
        pytest.skip(str(error))
    mesh = mesh_of(devices, data=2, tensor=2)
    split_heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=split_heads)
        for shape, dtype in zip(*recurrence_shapes(4, 512, 4, 64, 64, jnp.bfloat16), strict=True)
    ]
    with compile_ahead.aimed_at_devices(mesh):
        text = jax.jit(functools.partial(recurrence_gradients, backend="pallas_tpu")).lower(*arrays).compile().as_text()
    assert "tpu_custom_call" in text and not re.search(r"all-(gather|reduce|to-all)|collective-permute", text)
