"""Landmark attention on scheduled tiles: by tiles in plain jnp, and by the TPU kernels, simulated; values and all
gradients against the specification."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.landmark_attention import kernels, landmark_attention, reference, xla
from recollect.pallas_kernels.masks import (
    EarlierBlock,
    IsOrdinary,
    SameBlock,
    SameSegment,
    StoredNear,
    TokenFields,
    causal,
)
from recollect.pallas_kernels.scheduled_attention import flash_vjp, tpu
from tests.pallas_kernels import tiles_by_einsum
from tests.pallas_kernels.landmark_arguments import PACKED, arrays, document_positions, error, fields, rows

NAMES = ("out", "lse", "q", "k", "v")
FIELDS = ("query_positions", "key_positions", "query_segments", "key_segments")


def tile_sizes(n, s, k, v, dtype, *, window=None, block=None):
    """Small ones, so that there are several."""
    return 16, 8 if block is None else -(-(block + 1) // 4) * 4


BY_EINSUM = types.SimpleNamespace(
    forward=tiles_by_einsum.forward,
    query_gradient=tiles_by_einsum.query_gradient,
    key_gradients=tiles_by_einsum.key_gradients,
    refuses=lambda *args, **kwargs: None,
    tile_sizes=tile_sizes,
)


class _Hashable:
    """A namespace that custom_vjp can take for static."""

    def __init__(self, names):
        self.__dict__.update(vars(names))


by_einsum, _ = kernels.on_kernels(_Hashable(BY_EINSUM))
exact = reference.landmark_attention


def results(form, q, k, v, f, block):
    """Outputs, log-sum-exps and gradients of a loss that reads both. f: fields of queries and keys, or of both at
    once if `key_...` is absent."""
    given = {name: f.get(name, f.get(name.replace("key", "query"))) for name in FIELDS}
    how = {"block": block, "scale": q.shape[-1] ** -0.5, "self_attention": "key_positions" not in f}

    def loss(q, k, v):
        out, lse = form(q, k, v, **given, **how)
        counts = (jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) for x in (out, lse))
        weighted = [
            jnp.sum(jnp.where(jnp.isfinite(x), x, 0) * jnp.cos(i))
            for x, i in zip((out.astype(jnp.float32), lse), counts, strict=True)
        ]
        return weighted[0] + 0.3 * weighted[1], (out, lse)

    gradients, outs = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return (*outs, *gradients)


def off(found, expected) -> float:
    """rms over what is finite, which must be the same in both."""
    finite = np.isfinite(np.asarray(expected, np.float64))
    np.testing.assert_array_equal(np.isfinite(np.asarray(found, np.float64)), finite)
    return error(*(np.where(finite, np.asarray(x, np.float64), 0) for x in (found, expected)))


def assert_near(found, expected, limit):
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert off(a, b) < limit, name


def packed(segments):
    return {"query_positions": document_positions(segments), "query_segments": segments}


@pytest.mark.parametrize(
    ("t", "h", "g", "block"),
    [(1, 2, 1, 4), (63, 4, 2, 7), (40, 2, 2, 50), pytest.param(33, 2, 1, 1, marks=pytest.mark.wide)],
)
def test_tiles_are_the_specification_in_one_document(t, h, g, block):
    inputs = arrays(2, t, h, g)
    assert_near(*(results(form, *inputs, {}, block) for form in (by_einsum, exact)), 1e-6 if t > 1 else 1e-5)


@pytest.mark.parametrize("block", [4, pytest.param(11, marks=pytest.mark.wide)])
def test_tiles_are_the_specification_over_documents(block):
    inputs = arrays(3, 27, 4, 2)
    assert_near(*(results(form, *inputs, packed(PACKED), block) for form in (by_einsum, exact)), 1e-6)


def test_tiles_are_the_specification_against_a_cache():
    q, k, v = arrays(3, 12, 4, 2, s=27)
    assert_near(*(results(form, q, k, v, fields(PACKED, queries=12), 4) for form in (by_einsum, exact)), 1e-6)


def test_positions_without_segments():
    """Queries that go on where other keys end: no segments, positions known at run time only."""
    q, k, v = arrays(2, 9, 2, 1, s=30)
    f = {
        "query_positions": jnp.broadcast_to(jnp.arange(21, 30), (2, 9)),
        "key_positions": jnp.broadcast_to(jnp.arange(30), (2, 30)),
    }
    assert_near(*(results(form, q, k, v, f, 4) for form in (by_einsum, exact)), 1e-6)


def visits_of(run, monkeypatch):
    """Sizes of the schedules that a call makes, (mask, tiles that may be visited, tiles that are)."""
    seen, real = [], flash_vjp.block_schedule

    def noting(mask, *args):
        schedule = real(mask, *args)
        kinds = None if isinstance(schedule.kinds, jax.core.Tracer) else int((np.asarray(schedule.kinds) != 0).sum())
        seen.append((mask, int(schedule.most.sum()), kinds))
        return schedule

    monkeypatch.setattr(flash_vjp, "block_schedule", noting)
    run()
    return seen


def test_what_is_known_of_tiles_before_a_program_runs(monkeypatch):
    """One document from its start: exactly the own block's tiles and the earlier blocks. Documents: a band and a
    triangle."""
    q, k, v = arrays(1, 64, 1, 1)
    call = functools.partial(by_einsum, block=7, scale=1.0, self_attention=True)
    none = dict.fromkeys(FIELDS)
    (own, may, do), (blocks, may_blocks, do_blocks) = visits_of(
        lambda: jax.eval_shape(lambda q: call(q, k, v, **none), q), monkeypatch
    )
    # Tiles of 16 queries and of 8 keys, which are a block: each tile of queries meets two of its own, and 1, 3, 5, 7
    # before its last row's.
    assert (own, may, do) == (causal() & SameBlock() & IsOrdinary(), 8, 8)
    assert (blocks, may_blocks, do_blocks) == (EarlierBlock(), 16, 16)
    segments = rows([20, 44])
    positions = document_positions(segments)
    f = {"query_positions": positions, "key_positions": positions, "query_segments": segments, "key_segments": segments}

    def traced():
        jax.eval_shape(lambda q, f: call(q, k, v, **f), q, f)

    (_, may, _), (blocks, may_blocks, _) = visits_of(traced, monkeypatch)[-2:]
    assert may == 2 + 3 * 3  # of 8 keys a tile: the own two and the one before
    assert blocks == EarlierBlock() & SameSegment() & StoredNear() and may_blocks == 2 + 4 + 6 + 8


def test_place_of_storage_never_decides():
    """Masks that know of storage allow what they would without; they only know more of whole tiles."""
    assert StoredNear(3).allows(None, None) is np.True_
    mask = causal(segmented=True)
    query, key = (TokenFields(jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)) for _ in range(2))
    np.testing.assert_array_equal((mask & StoredNear(1)).allows(query, key), mask.allows(query, key))


def test_few_queries_against_a_cache_are_left_to_xla():
    q, k, v = arrays(1, 7, 2, 1, s=27)
    f = {"query_positions": jnp.arange(20, 27)[None], "key_positions": jnp.arange(27)[None]}
    with dispatch.interpreted(), pytest.raises(ValueError, match="at least 8 queries against other keys; got 7"):
        landmark_attention(q, k, v, block=4, **f, backend="pallas_tpu")


@settings(max_examples=2, deadline=None, database=None)
@given(st.data())
def test_tiles_are_the_specification_anywhere(data):
    b, t, g, r = (data.draw(st.integers(1, most)) for most in (2, 40, 2, 2))
    block = data.draw(st.integers(1, 12))
    documents = []
    for _ in range(b):
        row, left = [], t
        while left:
            size = data.draw(st.integers(1, left))
            row.append(size if data.draw(st.booleans()) or not row else -size)
            left -= size
        documents.append(row)
    inputs = arrays(b, t, g * r, g)
    found, expected = (results(form, *inputs, packed(rows(*documents)), block) for form in (by_einsum, exact))
    for name, a, c in zip(NAMES, found, expected, strict=True):
        assert off(a, c) < 3e-6 or np.sqrt(np.mean(np.square(a - c))) < 1e-6, (
            name
        )  # a row of single tokens has no gradient but rounding


def test_each_device_of_a_mesh_does_its_part():
    """Sequences over data, heads over tensor, fields with their sequences; gradients too."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    segments = rows([20, -3, 10], [-2, 31])
    inputs, f = arrays(2, 33, 4, 2), packed(segments)
    expected = results(exact, *inputs, f, 4)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed, f = jax.device_put((inputs, f), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        found = results(by_einsum, *placed, f, 4)
    assert_near(found, expected, 1e-6)
    assert len(found[0].sharding.device_set) == 4


# The kernels themselves: fp32 and bf16, simulated.


def races_found() -> bool:
    """Whether the simulator's last kernels raced; it only prints it, and the flag is internal."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


on_tpu, _ = kernels.on_kernels(tpu)

TPU_CASES = [
    # documents (None: one), t, h, g, dimensions, block, simulated how
    ([[14, -3, 16]], 33, 2, 1, 16, 8, "races"),
    pytest.param((None, 63, 2, 1, 16, 8, "races"), marks=pytest.mark.wide),
    pytest.param(([[30, -3, 30], [10, 53]], 63, 2, 1, 16, 8, "values"), marks=pytest.mark.wide),
    pytest.param((None, 1, 2, 1, 32, 8, "races"), marks=pytest.mark.wide),
    pytest.param((None, 257, 4, 2, 32, 50, "races"), marks=pytest.mark.wide),
    pytest.param(([[100, -20, 137], [-7, 250]], 257, 4, 2, 32, 50, "races"), marks=pytest.mark.wide),
    pytest.param(([[600, 17, 383]], 1000, 2, 1, 64, 63, "races"), marks=pytest.mark.wide),
]


@pytest.mark.parametrize("case", TPU_CASES, ids=str)
def test_tpu_kernels_are_the_specification(case):
    documents, t, h, g, dim, block, how = case
    inputs = arrays(2 if documents is None else len(documents), t, h, g, k=dim, v=dim)
    f = {} if documents is None else packed(rows(*documents))
    with dispatch.interpreted(how):
        found = results(on_tpu, *inputs, f, block)
        assert how == "values" or not races_found()
    assert_near(found, results(exact, *inputs, f, block), 1e-5)


@pytest.mark.parametrize("t", [pytest.param(41, marks=pytest.mark.wide), pytest.param(257, marks=pytest.mark.wide)])
def test_tpu_kernels_in_half_precision(t):
    half = tuple(x.astype(jnp.bfloat16) for x in arrays(1, t, 2, 1, k=32, v=32))
    f = packed(rows([20, t - 20]))
    with dispatch.interpreted():
        found = results(on_tpu, *half, f, 8)
    expected = results(exact, *(x.astype(jnp.float32) for x in half), f, 8)
    plain = results(xla.landmark_attention, *half, f, 8)
    for name, a, b, c in zip(NAMES, found, expected, plain, strict=True):
        assert a.dtype == (jnp.float32 if name == "lse" else jnp.bfloat16)
        assert off(a, b) < min(0.005 if name in ("out", "lse") else 0.01, max(0.005, 2 * off(c, b))), name


@pytest.mark.wide
def test_tpu_kernels_ignore_padding_and_repeat_themselves():
    segments = rows([-3, 30, -7, 23], [63])
    real = (segments != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0) for x in arrays(2, 63, 2, 1, k=16, v=16))
    with dispatch.interpreted():
        first, again, dirty = (
            results(on_tpu, *x, packed(segments), 8)
            for x in (clean, clean, tuple(jnp.where(real, x, jnp.nan) for x in clean))
        )
    for other in (again, dirty):
        jax.tree.map(np.testing.assert_array_equal, first, other)
