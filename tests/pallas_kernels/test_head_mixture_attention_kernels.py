"""Head-mixture attention on scheduled tiles: in plain form, and on the TPU's and the GPU's kernels, simulated,
against the specification in fp64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention, scheduled
from tests.pallas_kernels import tiles_by_einsum
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.test_head_mixture_attention import arguments, compare, error, exactly, results


class _Plain:
    """tiles_by_einsum as a kernel module."""

    forward, query_gradient, key_gradients = map(
        staticmethod, (tiles_by_einsum.forward, tiles_by_einsum.query_gradient, tiles_by_einsum.key_gradients)
    )

    @staticmethod
    def tile_sizes(n, s, k, v, dtype):
        return (8, 16)

    @staticmethod
    def refuses(*arguments, **more):
        return None


def plain(*, gates, return_lse, query_segments=None, query_positions=None, key_heads=None, **arguments):
    """The plain kernels, without the public function."""
    run, _ = scheduled.on_kernels(_Plain)
    q, k, v = (arguments.pop(name) for name in "qkv")
    chosen = arguments.pop("chosen")
    if query_segments is not None:
        real = query_segments != 0
        chosen = chosen & real[..., None]
        q, k, v = (jnp.where(real[..., None, None], x, 0) for x in (q, k, v))
    h = q.shape[2]
    out, lse = run(
        q,
        k,
        v,
        chosen,
        key_heads=key_heads or tuple(head // (h // k.shape[2]) for head in range(h)),
        query_positions=query_positions,
        key_positions=query_positions,
        query_segments=query_segments,
        key_segments=query_segments,
        **arguments,
    )
    return out * jnp.where(chosen, gates, 0)[..., None], lse


SIZES = {
    "documents": (63, {"segmented": True}),
    "one of six, grouped": (63, {"active": 1, "g": 3}),
    "all": (40, {"h": 3, "g": 3, "active": 3, "b": 1}),
    "one head takes everything, uneven groups": (90, {"h": 5, "g": 3, "active": 2, "crowd": 4, "segmented": True}),
    "one token": (1, {"active": 2}),
}
QUICK = ("one head takes everything, uneven groups",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.wide) for name in SIZES]
)
def test_the_plan_on_plain_tiles_is_the_specification(name):
    t, sizes = SIZES[name]
    inputs, fixed = arguments(t, **sizes)
    active = sizes.get("active", 3)
    found = results(functools.partial(plain, active=active, scale=0.3), inputs, fixed)
    compare(found, exactly(inputs, fixed, active=active, scale=0.3))


TPU = [
    (63, {"segmented": True, "b": 1, "h": 4, "g": 2, "active": 2}, "races"),
    pytest.param(1000, {"b": 1, "h": 3, "g": 3, "active": 1, "k": 16, "v": 32}, "values", marks=pytest.mark.wide),
    pytest.param(257, {"segmented": True, "h": 5, "g": 3, "active": 2, "crowd": 1}, "races", marks=pytest.mark.wide),
    pytest.param(257, {"h": 4, "g": 4, "active": 4, "k": 40, "v": 72}, "values", marks=pytest.mark.wide),
]


@pytest.mark.parametrize(("t", "sizes", "how"), TPU)
def test_tpu_kernels_are_the_specification(t, sizes, how):
    inputs, fixed = arguments(t, **sizes)
    with dispatch.interpreted(how):
        found = results(
            functools.partial(head_mixture_attention, active=sizes["active"], backend="pallas_tpu"), inputs, fixed
        )
    compare(found, exactly(inputs, fixed, active=sizes["active"]), 1e-4)
    if how == "races":
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert not interpret_pallas_call.races.races_found


@pytest.mark.wide
def test_padding_full_of_nan_touches_nothing():
    inputs, fixed = arguments(50, segmented=True, b=1, h=4, g=2, active=2)
    real = fixed["query_segments"] != 0
    clean, dirty = (
        {name: jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, filler) for name, x in inputs.items()}
        for filler in (0.0, jnp.nan)
    )
    run = functools.partial(head_mixture_attention, active=2, backend="pallas_tpu")
    with dispatch.interpreted():
        expected, found = results(run, clean, fixed), results(run, dirty, fixed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


GPU = [
    (63, {"segmented": True, "b": 1, "h": 2, "g": 1, "active": 1, "k": 64, "v": 64}),
    pytest.param(257, {"b": 1, "h": 4, "g": 2, "active": 2, "k": 64, "v": 64, "crowd": 3}, marks=pytest.mark.wide),
    pytest.param(1000, {"b": 1, "h": 3, "g": 3, "active": 1, "k": 40, "v": 72}, marks=pytest.mark.wide),
]


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(("t", "sizes"), GPU)
def test_gpu_kernels_are_the_specification(t, sizes):
    inputs, fixed = arguments(t, dtype=jnp.bfloat16, **sizes)
    with dispatch.interpreted("races"):
        (out, _), gradients = results(
            functools.partial(head_mixture_attention, active=sizes["active"], backend="pallas_gpu"), inputs, fixed
        )
    assert not races_found()
    (out_, _), gradients_ = exactly(inputs, fixed, active=sizes["active"])
    # Outputs are rounded twice: by the kernel, and after their gates.
    assert error(out, out_) < 0.006
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < 0.01, name


def test_each_device_of_a_mesh_takes_its_part():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    inputs, fixed = arguments(20, h=4, g=2, active=3, segmented=True)
    form = functools.partial(plain, active=3, scale=0.3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert "shard_map" in str(jax.make_jaxpr(functools.partial(form, return_lse=True))(**inputs, **fixed))
        placed = jax.device_put((inputs, fixed), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        found = results(form, *placed)
    compare(found, exactly(inputs, fixed, active=3, scale=0.3))


@pytest.mark.parametrize(
    ("backend", "sizes", "dtype", "reason"),
    [
        ("pallas_tpu", {"t": 7}, jnp.float32, "at least 8 queries; got 7"),
        ("pallas_tpu", {"k": 300}, jnp.float32, "at most 256 dimensions"),
        ("pallas_tpu", {}, jnp.float16, "all be bfloat16 or all float32"),
    ],
)
def test_what_kernels_refuse_they_explain(backend, sizes, dtype, reason):
    t, k = sizes.get("t", 64), sizes.get("k", 8)
    q, chosen = jax.ShapeDtypeStruct((1, t, 4, k), dtype), jax.ShapeDtypeStruct((1, t, 4), jnp.bool_)
    with (
        dispatch.interpreted(),
        pytest.raises(ValueError, match=f"head_mixture_attention: {backend} cannot serve this call: .*{reason}"),
    ):
        jax.eval_shape(functools.partial(head_mixture_attention, active=2, backend=backend), q, q, q, chosen)
