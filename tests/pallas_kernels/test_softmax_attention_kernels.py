"""Window attention on simulated TPU kernels (values and gradients against the reference in float64),
under meshes and over cuts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.softmax_attention import merge, softmax_attention
from tests.pallas_kernels.simulator import races_found
from tests.pallas_kernels.test_sharding import mesh_of

SINKS = (0.5, -1.0, 2.0, 0.0)


def packed(b: int, t: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Segments with padding inside documents, and positions within documents."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (b, t)), axis=1)
    segments[rng.random((b, t)) < 0.1] = 0
    positions = np.zeros((b, t), np.int32)
    for row, ids in enumerate(segments):
        for one in np.unique(ids[ids > 0]):
            positions[row, ids == one] = np.arange((ids == one).sum())
    return jnp.asarray(segments, jnp.int32), jnp.asarray(positions)


def draw(b, t, h, g, k, v, dtype=jnp.float32, s=None, seed=0):
    keys = jax.random.split(jax.random.key(seed + t), 3)
    shapes = ((b, t, h, k), (b, s or t, g, k), (b, s or t, g, v))
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def results(q, k, v, sinks, backend, how="values", **call):
    """Output, log-sum-exp, gradients by q, k, v (and sinks), each a numpy array of float64."""
    sinks = [] if sinks is None else [jnp.asarray(sinks[: q.shape[2]], jnp.float32)]

    def loss(q, k, v, *sinks):
        given = {"sinks": sinks[0]} if sinks else {}
        out, lse = softmax_attention(q, k, v, return_lse=True, backend=backend, **given, **call)
        total = jnp.sum(jnp.sin(out.astype(lse.dtype))) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0)))
        return total, (out, lse)

    with dispatch.interpreted(how):
        run = jax.jit(jax.grad(loss, argnums=range(3 + len(sinks)), has_aux=True))
        gradients, values = run(q, k, v, *sinks)
    return [np.asarray(x, np.float64) for x in (*values, *gradients)]


def errors(found, expected) -> list[float]:
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(two))
    pairs = [
        (np.where(np.isfinite(one), one, 0), np.where(np.isfinite(two), two, 0))
        for one, two in zip(found, expected, strict=True)
    ]
    return [float(np.sqrt(np.mean((one - two) ** 2)) / max(np.sqrt(np.mean(two**2)), 1e-6)) for one, two in pairs]


def exactly(q, k, v, sinks, **call):
    with jax.enable_x64(True):
        return results(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)), sinks, "reference", **call)


CASES = [
    pytest.param(1, 1, 1, 16, 16, 1, False, id="one token of a window of one", marks=pytest.mark.wide),
    pytest.param(63, 4, 2, 24, 40, None, False, id="63 causal"),
    pytest.param(257, 2, 1, 32, 16, 50, True, id="257 documents"),
    pytest.param(257, 4, 4, 64, 64, 100, False, id="257 window 100", marks=pytest.mark.wide),
    pytest.param(1000, 2, 2, 64, 64, 64, True, id="1000 documents", marks=pytest.mark.wide),
    pytest.param(1000, 1, 1, 128, 128, None, False, id="1000 causal", marks=pytest.mark.wide),
]


@pytest.mark.parametrize(("t", "h", "g", "k", "v", "window", "documents"), CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.wide)])
def test_kernels_are_the_definition(t, h, g, k, v, window, documents, dtype):
    q, k, v = draw(2, t, h, g, k, v, dtype)
    call = {"window": window}
    if documents:
        call["query_segments"], call["query_positions"] = packed(2, t, t)
    if t == 1:
        with pytest.raises(ValueError, match="at least 8 queries"):
            results(q, k, v, SINKS, "pallas_tpu", **call)
        return
    expected = exactly(q, k, v, SINKS, **call)
    kernels = errors(results(q, k, v, SINKS, "pallas_tpu", **call), expected)
    plain = errors(results(q, k, v, SINKS, "xla", **call), expected)
    if dtype == jnp.float32:
        assert max(kernels) < 1e-4 and max(plain) < 1e-5
    else:
        bars = [0.005, 0.005] + [0.01] * 4
        for found, other, bar in zip(kernels, plain, bars, strict=True):
            assert found < bar and found < max(2 * other, 0.005)


@settings(max_examples=3, deadline=None)
@given(
    t=st.integers(8, 90),
    h=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    k=st.integers(4, 40),
    v=st.integers(4, 40),
    window=st.one_of(st.none(), st.integers(1, 100)),
    documents=st.booleans(),
    sinks=st.booleans(),
)
def test_any_shape(t, h, k, v, window, documents, sinks):
    q, k, v = draw(2, t, *h, k, v)
    call = {"window": window}
    if documents:
        call["query_segments"], call["query_positions"] = packed(2, t, t)
    given = SINKS if sinks else None
    found, expected = (results(q, k, v, given, backend, **call) for backend in ("pallas_tpu", "reference"))
    assert max(errors(found, expected)) < 1e-4


def test_padding_full_of_nan_touches_nothing_and_bits_repeat():
    segments, positions = packed(2, 90, 1)
    call = {"query_segments": segments, "query_positions": positions, "window": 20}
    real = (segments != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0) for x in draw(2, 90, 2, 2, 16, 16))
    dirty = tuple(jnp.where(real, x, jnp.nan) for x in clean)
    first, second = (results(*arrays, SINKS, "pallas_tpu", **call) for arrays in (clean, dirty))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


def test_two_calls_are_one():
    """Queries in two parts; and keys in two parts, whose results are merged."""
    q, k, v = draw(2, 60, 2, 1, 16, 16)
    positions = jnp.broadcast_to(jnp.arange(60, dtype=jnp.int32), (2, 60))
    attend = functools.partial(softmax_attention, window=25, return_lse=True, backend="pallas_tpu")
    with dispatch.interpreted():
        whole, lse = jax.jit(attend)(q, k, v)
        cut = 37
        before, _ = jax.jit(attend)(q[:, :cut], k[:, :cut], v[:, :cut])
        after = [
            jax.jit(attend)(
                q[:, cut:], k[:, part], v[:, part], query_positions=positions[:, cut:], key_positions=positions[:, part]
            )
            for part in (slice(0, cut), slice(cut, 60))
        ]
    out, merged = merge(*after)
    np.testing.assert_allclose(jnp.concatenate([before, out], axis=1), whole, atol=2e-6)
    np.testing.assert_allclose(merged, lse[:, cut:], atol=2e-6)


def test_under_a_mesh():
    """Sequences and heads, grouped ones too, on devices of their own."""
    q, k, v = draw(4, 40, 4, 2, 16, 16)
    segments, positions = packed(4, 40, 3)
    call = {"query_segments": segments, "query_positions": positions, "window": 9}
    expected = results(q, k, v, SINKS, "reference", **call)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.device_put((q, k, v), NamedSharding(mesh, PartitionSpec()))
        found = results(*placed, SINKS, "pallas_tpu", **call)
    assert max(errors(found, expected)) < 1e-4


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(("g", "window"), [(1, 30), pytest.param(2, None, marks=pytest.mark.wide)])
def test_gpu_kernels_in_bf16(g, window):
    """Documents, sinks, grouped heads, sizes that are no multiple of a tile; no races."""
    q, k, v = draw(1, 100, 2, g, 48, 64, jnp.bfloat16)
    segments, positions = packed(1, 100, 5)
    call = {"window": window, "query_segments": segments, "query_positions": positions}
    expected = exactly(q, k, v, SINKS, **call)
    found = results(q, k, v, SINKS, "pallas_gpu", how="races", **call)
    assert not races_found()
    plain = errors(results(q, k, v, SINKS, "xla", **call), expected)
    for one, other, bar in zip(errors(found, expected), plain, [0.005, 0.005] + [0.01] * 4, strict=True):
        assert one < bar and one < max(2 * other, 0.005)


def test_what_kernels_refuse_is_told():
    q, k, v = draw(1, 20, 1, 1, 16, 16)
    with dispatch.interpreted():
        with pytest.raises(ValueError, match="as expressions over token fields"):
            softmax_attention(q, k, v, mask=jnp.ones((1, 20, 20), bool), backend="pallas_tpu")
        with pytest.raises(ValueError, match="at least 8 queries"):
            softmax_attention(q[:, :1], k[:, :1], v[:, :1], backend="pallas_tpu")
        with pytest.raises(ValueError, match="float16"):
            softmax_attention(*(x.astype(jnp.float16) for x in (q, k, v)), backend="pallas_tpu")
