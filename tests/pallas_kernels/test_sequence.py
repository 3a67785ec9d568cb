"""Operations whose tokens are split over a mesh: values and gradients equal one device's, and what devices exchange does not grow with the length
where a state or a window's worth suffices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence import linear_recurrence
from tests.pallas_kernels.test_sharding import mesh_of

# Three documents of which one spans four parts of eight tokens and more, padding between, at the end and over a whole part; another row.
SEGMENTS = np.array([[1] * 5 + [0] * 2 + [2] * 41 + [0] * 10 + [3] * 6, [4] * 9 + [5] * 33 + [0] * 22])
MESHES = [{"sequence": 8}, {"data": 2, "tensor": 2, "sequence": 2}]


def numbers(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def same_as_on_one_device(operation, arrays, sizes, tolerance=1e-5, backend=None, interpret=False):
    """operation(arrays) and the gradients of all floating arrays, with the mesh and without: errors relative to each array's largest."""
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    weights = None

    def run(floats, rest, backend):
        out = operation(**floats, **rest, backend=backend)
        out = jnp.where(rest["segment_ids"].reshape(*rest["segment_ids"].shape, *(1,) * (out.ndim - 2)) != 0, out, 0) if rest else out
        return jnp.sum(out * weights), out

    slope = jax.value_and_grad(run, has_aux=True)
    shape = jax.eval_shape(lambda: operation(**arrays)).shape
    weights = jax.random.normal(jax.random.key(9), shape)
    (_, wanted), wanted_gradients = jax.jit(functools.partial(slope, backend=None))(floats, rest)
    mesh = mesh_of(**sizes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), dispatch.interpreted() if interpret else dispatch.preferred_backend("xla"):
        floats, rest = jax.device_put((floats, rest), NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(functools.partial(slope, backend=backend)).lower(floats, rest)
        assert "shard_map" in compiled.as_text() or "manual" in compiled.as_text()
        (_, found), gradients = compiled.compile()(floats, rest)
    for name, a, b in [("out", found, wanted), *((name, gradients[name], wanted_gradients[name]) for name in floats)]:
        worst = float(jnp.max(jnp.abs(a - b))) / float(jnp.max(jnp.abs(b)))
        assert worst <= tolerance, f"{name}: {worst:.1e}"


def recurrence_arrays(decay, write, erase, b=2, t=64, h=2, g=2, k=4, v=6):
    shapes = {"q": (b, t, g, k), "k": (b, t, g, k), "v": (b, t, h, v)}
    arrays = dict(zip(shapes, numbers(*shapes.values()), strict=True))
    decays = {"constant": (h,), "head": (b, t, h), "channel": (b, t, h, k)}
    if decay != "none":
        arrays["log_decay"] = -0.2 * jax.nn.softplus(numbers(decays[decay], seed=1)[0])
    if write != "none":
        arrays["write_strength"] = jax.nn.sigmoid(numbers((b, t, h) if write == "head" else (b, t, h, v), seed=2)[0])
    if erase != "none":
        arrays["k"] /= jnp.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays["erase_read"] = 0.5 * arrays["k"]
    if erase == "apart":
        arrays["erase_write"] = arrays["k"] + 0.1 * numbers(arrays["k"].shape, seed=3)[0]
    return arrays


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(
    ("decay", "write", "erase", "packed"),
    [
        ("none", "none", "none", False),
        ("constant", "none", "none", True),
        ("head", "head", "none", True),
        ("channel", "none", "none", True),
        ("none", "head", "own", True),
        ("channel", "channel", "apart", True),
    ],
)
def test_linear_recurrence(sizes, decay, write, erase, packed):
    arrays = recurrence_arrays(decay, write, erase)
    if packed:
        arrays["segment_ids"] = jnp.asarray(SEGMENTS)
    same_as_on_one_device(lambda **given: linear_recurrence(**given)[0], arrays, sizes)
