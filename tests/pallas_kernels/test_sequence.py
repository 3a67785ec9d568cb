"""Operations whose tokens are split over a mesh: values and gradients equal one device's, and what devices exchange
does not grow with the length where a state or a window's worth suffices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recollect.layers.packing import document_positions
from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.gated_convolution import long_convolution, short_convolution
from recollect.pallas_kernels.head_mixture_attention import head_mixture_attention
from recollect.pallas_kernels.landmark_attention import landmark_attention
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.masks import Causal, SameSegment, Sinks, Window
from recollect.pallas_kernels.softmax_attention import softmax_attention
from recollect.pallas_kernels.taylor_attention import taylor_attention
from tests.pallas_kernels.test_sharding import mesh_of

# Three documents of which one spans four parts of eight tokens and more, padding between, at the end and over a whole
# part; another row.
SEGMENTS = np.array([[1] * 5 + [0] * 2 + [2] * 41 + [0] * 10 + [3] * 6, [4] * 9 + [5] * 33 + [0] * 22])
MESHES = [
    {"tensor": 2, "sequence": 4},
    pytest.param({"sequence": 8}, marks=pytest.mark.wide),
    pytest.param({"data": 2, "tensor": 2, "sequence": 2}, marks=pytest.mark.wide),
]


SLOW = pytest.mark.wide


def numbers(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def same_as_on_one_device(operation, arrays, sizes, tolerance=1e-5, backend=None, interpret=False):
    """operation(arrays) and the gradients of all floating arrays, with the mesh and without: errors relative to each
    array's largest."""
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    weights = None

    def run(floats, rest, backend):
        out = operation(**floats, **rest, backend=backend)
        out = (
            jnp.where(rest["segment_ids"].reshape(*rest["segment_ids"].shape, *(1,) * (out.ndim - 2)) != 0, out, 0)
            if rest
            else out
        )
        return jnp.sum(out * weights), out

    value_and_gradient = jax.value_and_grad(run, has_aux=True)
    shape = jax.eval_shape(lambda: operation(**arrays)).shape
    weights = jax.random.normal(jax.random.key(9), shape)
    (_, wanted), wanted_gradients = jax.jit(functools.partial(value_and_gradient, backend=None))(floats, rest)
    mesh = mesh_of(**sizes)
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        dispatch.interpreted() if interpret else dispatch.preferred_backend("xla"),
    ):
        floats, rest = jax.device_put((floats, rest), NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(functools.partial(value_and_gradient, backend=backend)).lower(floats, rest)
        assert "shard_map" in compiled.as_text() or "manual" in compiled.as_text()
        (_, found), gradients = compiled.compile()(floats, rest)
    for name, a, b in [("out", found, wanted), *((name, gradients[name], wanted_gradients[name]) for name in floats)]:
        worst = float(jnp.max(jnp.abs(a - b))) / float(jnp.max(jnp.abs(b)))
        assert worst <= tolerance, f"{name}: {worst:.1e}"


def recurrence_arrays(decay, write, erase, columns=False, b=2, t=64, h=2, g=2, k=4, v=6):
    shapes = {"q": (b, t, g, k), "k": (b, t, g, k), "v": (b, t, h, v)}
    arrays = dict(zip(shapes, numbers(*shapes.values()), strict=True))
    decays = {"constant": (h,), "head": (b, t, h), "channel": (b, t, h, k)}
    if decay != "none":
        arrays["log_decay"] = -0.2 * jax.nn.softplus(numbers(decays[decay], seed=1)[0])
    if columns:
        arrays["value_log_decay"] = -0.2 * jax.nn.softplus(numbers((b, t, h, v), seed=4)[0])
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
        pytest.param("none", "none", "none", False, marks=SLOW),
        ("constant", "none", "none", True),
        pytest.param("head", "head", "none", True, marks=SLOW),
        pytest.param("channel", "none", "none", True, marks=SLOW),
        ("none", "head", "own", True),
        pytest.param("channel", "channel", "apart", True, marks=SLOW),
    ],
)
def test_linear_recurrence(sizes, decay, write, erase, packed):
    arrays = recurrence_arrays(decay, write, erase)
    if packed:
        arrays["segment_ids"] = jnp.asarray(SEGMENTS)
    same_as_on_one_device(lambda **given: linear_recurrence(**given)[0], arrays, sizes)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(
    ("decay", "erase", "columns"),
    [("channel", "apart", False), ("channel", "none", True), pytest.param("none", "none", True, marks=SLOW)],
)
def test_linear_recurrence_that_erases_before_its_decay_or_decays_columns(decay, erase, columns, packed):
    arrays = recurrence_arrays(decay, "none", erase, columns)
    if packed:
        arrays["segment_ids"] = jnp.asarray(SEGMENTS)
    before = erase != "none"
    same_as_on_one_device(
        lambda **given: linear_recurrence(**given, erase_before_decay=before)[0], arrays, {"tensor": 2, "sequence": 4}
    )


def attention_arrays(b=2, t=64, h=4, g=2, d=8, packed=True):
    q, k, v = numbers((b, t, h, d), (b, t, g, d), (b, t, g, d))
    arrays = {"q": q, "k": k, "v": v}
    return {**arrays, "segment_ids": jnp.asarray(SEGMENTS)} if packed else arrays


def attending(operation, *more, **settings):
    """`operation` with query_segments and query_positions made of segment_ids, as mixers call it."""

    def run(q, k, v, *, segment_ids=None, backend=None, **arrays):
        fields = {}
        if segment_ids is not None:
            fields = {"query_segments": segment_ids, "query_positions": document_positions(segment_ids)}
        return operation(q, k, v, *(arrays.pop(name) for name in more), **arrays, **fields, **settings, backend=backend)

    return run


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("packed", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("normalise", [True, pytest.param(False, marks=SLOW)])
def test_taylor_attention(sizes, packed, normalise):
    operation = functools.partial(taylor_attention, normalise=normalise)
    same_as_on_one_device(lambda **given: operation(**given)[0], attention_arrays(h=2, d=4, packed=packed), sizes)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(
    ("window", "packed", "sinks"),
    [
        (5, False, False),
        (9, True, True),
        pytest.param(12, True, False, marks=SLOW),
        (20, False, True),
        pytest.param(60, True, False, marks=SLOW),
        (None, True, True),
        pytest.param(None, False, False, marks=SLOW),
    ],
)
def test_softmax_attention(sizes, window, packed, sinks):
    arrays = attention_arrays(packed=packed)
    if sinks:
        arrays["sinks"] = numbers((4,), seed=4)[0]
    same_as_on_one_device(attending(softmax_attention, window=window), arrays, sizes)


@pytest.mark.wide
def test_masks_read_true_positions():
    mask = Causal() & (Window(6) | Sinks(2)) & SameSegment()
    same_as_on_one_device(attending(softmax_attention, mask=mask), attention_arrays(), {"sequence": 8})
    dense = jax.random.bernoulli(jax.random.key(5), 0.5, (1, 64, 64)) | jnp.eye(64, dtype=bool)
    same_as_on_one_device(
        attending(softmax_attention, mask=dense), attention_arrays(packed=False), {"sequence": 4, "tensor": 2}
    )


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("packed", [pytest.param(False, marks=SLOW), True])
def test_landmark_attention(sizes, packed):
    same_as_on_one_device(attending(landmark_attention, block=3), attention_arrays(packed=packed), sizes)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("key_heads", [None, pytest.param((0, 1, 0, 0), marks=SLOW)])
def test_head_mixture_attention(sizes, key_heads):
    arrays = attention_arrays()
    scores = numbers((2, 64, 4), seed=6)[0]
    arrays["gates"] = jax.nn.softmax(scores)
    arrays["chosen"] = scores >= jnp.sort(scores, axis=-1)[..., 2:3]
    same_as_on_one_device(attending(head_mixture_attention, "chosen", active=2, key_heads=key_heads), arrays, sizes)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(
    ("taps", "packed", "gated"),
    [
        pytest.param(3, False, True, marks=SLOW),
        (4, True, True),
        pytest.param(12, True, False, marks=SLOW),
        pytest.param(1, True, True, marks=SLOW),
    ],
)
def test_short_convolution(sizes, taps, packed, gated):
    d = 6
    names = ["x", "taps", "bias", *(["in_gate", "out_gate"] if gated else [])]
    shapes = {"x": (2, 64, d), "taps": (taps, d), "bias": (d,), "in_gate": (2, 64, d), "out_gate": (2, 64, d)}
    arrays = dict(zip(names, numbers(*(shapes[name] for name in names)), strict=True))
    if packed:
        arrays["segment_ids"] = jnp.asarray(SEGMENTS)
    same_as_on_one_device(lambda **given: short_convolution(**given, activation="silu")[0], arrays, sizes)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=SLOW)])
def test_long_convolution(sizes, packed):
    """Channels that the devices divide only when filled up."""
    arrays = dict(zip(["x", "filter", "out_gate", "skip"], numbers((2, 64, 6), (50, 6), (2, 64, 6), (6,)), strict=True))
    if packed:
        arrays["segment_ids"] = jnp.asarray(SEGMENTS)
    same_as_on_one_device(long_convolution, arrays, sizes)


@pytest.mark.wide
@pytest.mark.parametrize("operation", ["linear recurrence", "short convolution"])
def test_kernels_on_parts(operation):
    """Simulated TPU kernels on each device's tokens, against the plain forms on one device."""
    sizes, tolerance = {"sequence": 2}, 1e-4  # as kernels without a mesh
    if operation == "linear recurrence":
        arrays = recurrence_arrays("constant", "none", "none") | {"segment_ids": jnp.asarray(SEGMENTS)}
        same_as_on_one_device(
            lambda **given: linear_recurrence(**given)[0], arrays, sizes, tolerance, "pallas_tpu", interpret=True
        )
    else:
        arrays = dict(zip(["x", "taps", "in_gate"], numbers((2, 64, 6), (3, 6), (2, 64, 6)), strict=True)) | {
            "segment_ids": jnp.asarray(SEGMENTS)
        }
        same_as_on_one_device(
            lambda **given: short_convolution(**given)[0], arrays, sizes, tolerance, "pallas_tpu", interpret=True
        )
