"""Window attention: the xla forms against the specification, and the specification against cases worked by hand."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.layers.packing import document_positions
from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.softmax_attention import softmax_attention, xla

CLOSE = 2e-6  # rms, fp32: a few roundings over sums of up to 300 terms


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found), initial=0))


attend = jax.jit(softmax_attention, static_argnames=("window", "return_lse", "backend"))


def arrays(b, t, h, g, s=None, k=8, v=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(t), 4)
    s = t if s is None else s
    shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))


def ragged(b: int, t: int) -> jax.Array:
    """Rows of documents of uneven length, with padding at the start, inside documents, between them and at the end."""
    rng = np.random.default_rng(t)
    rows = np.sort(rng.integers(1, 4, (b, t)), axis=1)
    rows[rng.random((b, t)) < 0.15] = 0
    rows[0, :3] = 0
    rows[-1, -5:] = 0
    return jnp.asarray(rows, jnp.int32)


@functools.partial(jax.jit, static_argnames=("window", "backend"))
def values_and_gradients(q, k, v, fields, sinks, *, window, backend):
    """Output, log-sum-exp, and the gradients by q, k, v and sinks of a sum that weighs both unevenly."""

    def run(q, k, v, sinks):
        out, lse = softmax_attention(q, k, v, sinks=sinks, window=window, return_lse=True, backend=backend, **fields)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sum(out * weights) + jnp.sum(finite * weights[..., 0]), (out, lse)

    gradients, outputs = jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
    return outputs, gradients


def assert_agree(q, k, v, fields=None, *, window=None, sinks=None):
    fields = fields or {}
    (out, lse), gradients = values_and_gradients(q, k, v, fields, sinks, window=window, backend="xla")
    (out_, lse_), gradients_ = values_and_gradients(q, k, v, fields, sinks, window=window, backend="reference")
    assert error(out, out_) < CLOSE
    assert np.array_equal(np.isfinite(lse), np.isfinite(lse_))
    assert error(jnp.where(jnp.isfinite(lse), lse, 0), jnp.where(jnp.isfinite(lse_), lse_, 0)) < CLOSE
    for name, got, expected in zip(("q", "k", "v", "sinks"), gradients, gradients_, strict=True):
        if expected is not None:
            assert error(got, expected) < CLOSE, name
    return out, lse


@pytest.mark.parametrize(("t", "window"), [(1, 1), (63, 7), (257, None), (257, 1), (257, 50), (257, 100), (257, 300)])
def test_forms_agree_in_one_document(t, window):
    q, k, v = arrays(2, t, 4, 2)
    assert_agree(q, k, v, window=window, sinks=None if window == 50 else jnp.array([0.5, -1.0, 3.0, 0.0]))


@pytest.mark.parametrize(("t", "window"), [(63, 7), (257, None), (257, 50), (300, 33)])
def test_forms_agree_over_documents_and_padding(t, window):
    segments = ragged(3, t)
    fields = {"query_segments": segments, "query_positions": document_positions(segments)}
    assert_agree(*arrays(3, t, 4, 1), fields, window=window, sinks=jnp.array([0.5, -1.0, 3.0, 0.0]))


def test_without_positions_padding_counts_as_distance():
    assert_agree(*arrays(3, 130, 1, 1), {"query_segments": ragged(3, 130)}, window=9)


def test_positions_that_skip_shrink_the_window():
    positions = jnp.broadcast_to(3 * jnp.arange(130, dtype=jnp.int32), (2, 130))
    q, k, v = arrays(2, 130, 2, 2)
    out, _ = assert_agree(q, k, v, {"query_positions": positions}, window=7)
    counted = attend(q, k, v, window=3)  # 7 positions hold 3 tokens when positions go by threes
    assert error(out, counted) < CLOSE


@pytest.mark.parametrize("window", [None, 4])
def test_forms_agree_between_two_sequences(window):
    q, k, v = arrays(2, 5, 4, 4, s=40)
    segments = ragged(2, 40)
    fields = {
        "query_positions": document_positions(segments)[:, -5:],
        "key_positions": document_positions(segments),
        "query_segments": segments[:, -5:],
        "key_segments": segments,
    }
    assert_agree(q, k, v, fields, window=window)
    shuffle = jax.random.permutation(jax.random.key(0), 40)
    mixed = {**fields, "key_positions": fields["key_positions"][:, shuffle], "key_segments": segments[:, shuffle]}
    out, _ = assert_agree(q, k[:, shuffle], v[:, shuffle], mixed, window=window)
    assert error(out, attend(q, k, v, window=window, **fields)) < CLOSE


def test_keys_in_ring_order_are_not_taken_for_self_attention():
    q, k, v = arrays(1, 100, 1, 1)
    positions = jnp.arange(100, dtype=jnp.int32)[None]
    turned = {"query_positions": positions, "key_positions": jnp.roll(positions, 40, axis=1)}
    out, _ = assert_agree(q, jnp.roll(k, 40, axis=1), jnp.roll(v, 40, axis=1), turned, window=5)
    assert error(out, attend(q, k, v, window=5)) < CLOSE


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_queries_that_see_nothing_give_zeros(rows, with_sinks):
    q, k, v = arrays(2, 6, 2, 1, s=9)
    mask = jax.random.bernoulli(jax.random.key(1), 0.4, (rows, 6, 9)).at[:, 2].set(False)
    sinks = jnp.array([0.3, -0.2]) if with_sinks else None
    out, lse = assert_agree(q, k, v, {"mask": mask}, sinks=sinks)
    assert np.all(np.asarray(out[:, 2]) == 0)
    expected = jnp.broadcast_to(sinks, (2, 2)) if with_sinks else jnp.full((2, 2), -jnp.inf)
    assert np.allclose(lse[:, 2], expected, atol=1e-6)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_one_query_on_a_gpu_is_what_it_is_elsewhere(with_sinks):
    (q, k, v), scale = arrays(3, 1, 4, 4, s=21), 0.3
    allowed = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 1, 21)).at[1].set(False)
    sinks = jnp.arange(4.0)[:, None, None] if with_sinks else None
    bias = jax.random.normal(jax.random.key(2), (3, 4, 1, 1, 21))
    arguments = (q[:, :, :, None], k, v, allowed, scale, sinks, bias)
    expected = xla.attend(*arguments)
    with dispatch.aimed_at("gpu", "a GPU"):
        text = jax.make_jaxpr(lambda *some: xla.attend(*some, scale, sinks, bias))(*arguments[:4])
        found = xla.attend(*arguments)
    assert "dot_general" not in str(text)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_padding_full_of_nan_touches_nothing(backend):
    segments = ragged(2, 90)
    fields = {"query_segments": segments, "query_positions": document_positions(segments)}
    real = (segments != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0) for x in arrays(2, 90, 2, 2))
    dirty = tuple(jnp.where(real, x, jnp.nan) for x in clean)
    expected = values_and_gradients(*clean, fields, jnp.zeros(2), window=6, backend=backend)
    found = values_and_gradients(*dirty, fields, jnp.zeros(2), window=6, backend=backend)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.all(np.asarray(found[0][0])[np.asarray(segments) == 0] == 0)


def test_by_hand():
    """Scores are zero, so seen keys weigh alike: means over the last two tokens, and a sink of log 2 that counts as
    two more keys."""
    q = k = jnp.zeros((1, 4, 1, 3))
    v = jnp.array([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
    for backend in ("xla", "reference"):
        out = attend(q, k, v, window=2, backend=backend)
        np.testing.assert_allclose(out.ravel(), [1, 1.5, 3, 6], rtol=1e-6)
        out, lse = attend(q, k, v, window=2, sinks=jnp.log(jnp.array([2.0])), return_lse=True, backend=backend)
        np.testing.assert_allclose(out.ravel(), [1 / 3, 3 / 4, 6 / 4, 12 / 4], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), np.log([3, 4, 4, 4]), rtol=1e-6)


def test_query_heads_share_key_heads_in_order():
    q, k, v = arrays(1, 20, 4, 2)
    wide = attend(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
    assert error(attend(q, k, v), wide) < CLOSE


def test_large_scores_do_not_overflow():
    q, k, v = arrays(1, 40, 1, 1)
    out, _ = assert_agree(100 * q, 100 * k, v)
    assert np.all(np.isfinite(out))


def test_half_precision_stays_near():
    q, k, v = arrays(2, 200, 2, 2)
    expected = attend(q, k, v, window=20)
    out, lse = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), window=20, return_lse=True)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert error(out, expected) < 0.01  # 8 bits of fraction: 0.4 % a rounding


def test_work_grows_with_the_window():
    def flops(t, window):
        inputs = [jax.ShapeDtypeStruct((1, t, 1, 32), jnp.float32)] * 3
        return (
            jax.jit(lambda q, k, v: softmax_attention(q, k, v, window=window)).lower(*inputs).cost_analysis()["flops"]
        )

    assert flops(4096, 64) < 2.2 * flops(2048, 64)  # twice the tokens, twice the work
    assert flops(4096, 64) < 0.1 * flops(4096, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((4, 3, 8))}, "q must have four"),
        ({"k": jnp.zeros((2, 6, 3, 8))}, "v must be"),
        ({"k": jnp.zeros((2, 6, 2, 7))}, "k must be"),
        ({"k": jnp.zeros((2, 6, 3, 8)), "v": jnp.zeros((2, 6, 3, 5))}, "no multiple"),
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": jnp.zeros(3)}, "sinks must be"),
        ({"mask": jnp.ones((2, 6, 5), bool)}, "mask must be"),
        ({"mask": jnp.ones((2, 6, 6))}, "mask must be"),
        ({"query_positions": jnp.zeros((6,), jnp.int32)}, "query_positions must be"),
        ({"key_segments": jnp.zeros((2, 6), jnp.int32)}, "given together"),
        ({"q": jnp.zeros((2, 4, 4, 8))}, "need query_positions"),
        ({"backend": "pallas_gpu"}, "pallas_gpu cannot serve"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"q": jnp.zeros((2, 6, 4, 8)), "k": jnp.zeros((2, 6, 2, 8)), "v": jnp.zeros((2, 6, 2, 5)), **changes}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(softmax_attention)(**arguments)
