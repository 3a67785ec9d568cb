"""The recurrence's scans as GPU kernels, simulated with race detection, against plain jnp in fp64
(chunk_scan_by_einsum); what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.cost.hlo_cost import work_of
from recollect.pallas_kernels import compile_ahead, compilers, dispatch
from recollect.pallas_kernels.linear_recurrence import gpu, gpu_body, linear_recurrence
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Chunks
from tests.pallas_kernels import chunk_scan_by_einsum
from tests.pallas_kernels.chunk_scans_on_gpu import (
    CLOSE,
    C,
    compare,
    delta_scan_with,
    exactly,
    paired_with,
    rows,
    scan_with,
    simulated,
    solve_with,
    some_chunks,
)
from tests.pallas_kernels.programs import all_programs
from tests.pallas_kernels.programs import linear_recurrence_gpu as programs
from tests.pallas_kernels.test_linear_recurrence import error

SLOW = pytest.mark.wide


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    ("decay", "t", "key_dim", "value_dim", "heads", "strength", "more"),
    [
        ("none", 64, 64, 64, (1, 1), 0, ""),
        ("none", 192, 20, 40, (1, 2), 0, "reverse strict state documents"),
        ("head", 192, 64, 64, (1, 1), 0.1, ""),
        ("head", 192, 128, 128, (1, 1), 0.3, "reverse strict state documents dots checkpoints"),
        ("key", 128, 64, 64, (1, 1), 0.1, "state dots checkpoints"),
        ("key", 128, 64, 64, (1, 1), 6.0, "reverse documents state"),
        ("key", 192, 128, 128, (1, 1), 0.1, "state checkpoints"),
        ("key", 192, 100, 128, (1, 2), 6.0, "reverse strict documents state"),
        ("value", 128, 64, 64, (1, 1), 0.1, "reverse strict wide state checkpoints"),
        ("value", 128, 64, 64, (1, 1), 6.0, "documents dots"),
        ("none", 256, 64, 64, (1, 2), 0, "reverse spans"),  # 2 of 2 chunks
        ("head", 320, 64, 64, (1, 2), 0.01, "state documents dots checkpoints spans"),  # 2, 2 and 1
        ("key", 192, 64, 64, (1, 1), 0.02, "reverse state checkpoints spans"),
        ("value", 192, 64, 64, (1, 1), 0.01, "wide state strict spans"),
        pytest.param("none", 128, 192, 64, (1, 1), 0, "state", marks=SLOW),
        pytest.param("head", 256, 64, 128, (2, 4), 0.1, "state documents dots checkpoints", marks=SLOW),
        pytest.param("head", 192, 256, 64, (1, 1), 20.0, "reverse dots", marks=SLOW),
        pytest.param("key", 192, 128, 64, (1, 2), 0.1, "reverse strict documents state", marks=SLOW),
        pytest.param("key", 64, 128, 256, (1, 1), 0.1, "", marks=SLOW),
        pytest.param("value", 192, 128, 128, (1, 2), 0.1, "reverse documents state checkpoints", marks=SLOW),
        pytest.param("head", 320, 128, 128, (1, 1), 0.01, "reverse state dots checkpoints spans", marks=SLOW),
        pytest.param("value", 320, 64, 128, (1, 1), 0.01, "reverse state checkpoints spans", marks=SLOW),
    ],
)
def test_chunk_scan(decay, t, key_dim, value_dim, heads, strength, more):
    few, many = heads
    chunks = some_chunks(t, many, key_dim if decay == "key" else value_dim, decay, "documents" in more, strength)
    state = (
        jnp.asarray(np.random.default_rng(9).normal(size=(1, many, key_dim, value_dim)), jnp.float32)
        if "state" in more
        else None
    )
    dot_with = rows(t, many, value_dim, 4) if "dots" in more else None
    given = (rows(t, few, key_dim, 1), rows(t, many, key_dim, 2), rows(t, many, value_dim, 3), chunks, state, dot_with)
    settings = {"heads": many, "scale": 0.7, "reverse": "reverse" in more, "strict": "strict" in more}
    settings |= {
        "checkpoint_every": 2 if "checkpoints" in more else None,
        "out_dtype": jnp.float32 if "wide" in more else None,
    }
    found = simulated(functools.partial(scan_with, gpu.scan), *given, spans=3 if "spans" in more else 1, **settings)
    assert found.o.dtype == (jnp.float32 if "wide" in more else jnp.bfloat16)
    compare(
        found,
        exactly(
            functools.partial(scan_with, chunk_scan_by_einsum.scan), *given, **settings | {"out_dtype": jnp.float64}
        ),
    )


def extreme_decays(t: int) -> np.ndarray:
    """(patterns, t) log decays: those at which a factor that is a product of others might overflow, vanish or be
    rounded."""
    token = np.arange(t)
    patterns = [
        np.zeros(t),
        np.full(t, -1e-6),
        np.full(t, -10.0),
        np.where(token % 2, -10.0, 0.0),
        np.where(token % 16 < 8, -10.0, 0.0),
        np.where(token % 16 < 8, 0.0, -10.0),
        np.where(
            token % 64 < 16, np.where(token % 16 < 8, 0.0, -10.0), -0.46
        ),  # e^-80 to a block's border, e^-7.4 on to the middle
        np.where(token % 64 >= 48, np.where(token % 16 < 8, -10.0, 0.0), -0.46),
    ]
    return np.stack(patterns)


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize("more", ["", "strict", "reverse", "reverse strict"])
@pytest.mark.parametrize("decay", ["key", "value"])
def test_extreme_decays(decay, more):
    """A pattern per head and every number positive, so that nothing cancels and each can be held to what bf16 rounds
    away.

    None is below 0.01: times e^-80, level 0's smallest factor, a number below 6e-4 is none that fp32 holds in full.
    """
    t, size = C, 64
    g = extreme_decays(t)
    heads = len(g)
    total = np.cumsum(g.reshape(heads, t // C, C).astype(np.float32), axis=2, dtype=np.float32).reshape(heads, t)
    chunks = Chunks(C, decay, jnp.asarray(np.broadcast_to(total.T[None, :, :, None], (1, t, heads, size))))
    state = jnp.asarray(np.abs(np.random.default_rng(9).normal(size=(1, heads, size, size))), jnp.float32)
    given = (*(jnp.abs(rows(t, heads, size, seed)) + jnp.bfloat16(0.01) for seed in range(3)), chunks, state, None)
    settings = {"heads": heads, "reverse": "reverse" in more, "strict": "strict" in more, "out_dtype": jnp.float32}
    found = simulated(functools.partial(scan_with, gpu.scan), *given, **settings)
    expected = exactly(
        functools.partial(scan_with, chunk_scan_by_einsum.scan), *given, **settings | {"out_dtype": jnp.float64}
    )
    for head in range(heads):
        assert error(found.o[:, :, head], expected.o[:, :, head]) < CLOSE["o"], head
        assert error(found.state[:, head], expected.state[:, head]) < CLOSE["state"], head
        difference = np.abs(np.asarray(found.o[0, :, head], np.float64) - expected.o[0, :, head])
        assert (difference < 0.01 * expected.o[0, :, head]).all(), head


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    ("decay", "t", "key_dim", "value_dim", "heads", "strength", "more"),
    [
        ("none", 128, 64, 64, (1, 2), 0, "queries"),
        ("none", 128, 64, 64, (1, 2), 0, "second"),
        ("none", 128, 64, 64, (1, 2), 0, "second scale 0"),
        ("head", 192, 64, 64, (1, 1), 0.1, "queries documents state checkpoints"),
        ("head", 192, 64, 128, (1, 1), 0.1, "second reverse documents state checkpoints"),
        ("key", 128, 64, 64, (1, 1), 0.1, "queries documents state"),
        ("key", 128, 64, 64, (1, 1), 6.0, "second reverse documents state"),
        ("none", 256, 64, 64, (1, 2), 0, "second reverse spans"),  # 2 of 2 chunks
        ("head", 320, 64, 128, (1, 1), 0.01, "queries documents state checkpoints spans"),  # 2, 2 and 1
        ("key", 192, 128, 64, (1, 1), 0.01, "second reverse documents state checkpoints spans"),
        pytest.param("key", 128, 64, 64, (1, 1), 0.1, "queries second documents state", marks=SLOW),
        pytest.param("key", 128, 64, 64, (1, 1), 0.1, "queries second reverse state", marks=SLOW),
        pytest.param("none", 128, 128, 128, (1, 1), 0, "queries second", marks=SLOW),
        pytest.param("head", 192, 192, 64, (1, 1), 0.1, "queries state", marks=SLOW),
        pytest.param("key", 192, 128, 40, (1, 2), 0.1, "queries documents state checkpoints", marks=SLOW),
        pytest.param("key", 192, 128, 64, (1, 1), 0.1, "second reverse state checkpoints", marks=SLOW),
        pytest.param("none", 192, 192, 64, (1, 1), 0, "queries state spans", marks=SLOW),
        pytest.param("key", 192, 128, 128, (1, 2), 0.1, "queries documents state checkpoints", marks=SLOW),
        pytest.param("key", 192, 128, 128, (1, 1), 0.1, "second reverse documents state", marks=SLOW),
        pytest.param("key", 128, 128, 128, (1, 1), 0.1, "queries second reverse state", marks=SLOW),
    ],
)
def test_delta_scan(decay, t, key_dim, value_dim, heads, strength, more):
    few, many = heads
    chunks = some_chunks(t, many, key_dim, decay, "documents" in more, strength)
    given = {}
    if "queries" in more:
        given["q"] = rows(t, few, key_dim, 5)
    if "second" in more:
        given["second"] = (rows(t, few, key_dim, 6), rows(t, many, value_dim, 7))
    if "state" in more:
        given["initial_state"] = jnp.asarray(
            np.random.default_rng(9).normal(size=(1, many, key_dim, value_dim)), jnp.float32
        )
    small = (
        key_dim**-0.5
    )  # keys of length 1, and little erased of them, as in trained models: else the state grows without bound
    arrays = (
        rows(t, many, key_dim, 1, 0.3 * small),
        rows(t, many, value_dim, 2),
        rows(t, few, key_dim, 3, small),
        chunks,
        given,
    )
    settings = {"heads": many, "reverse": "reverse" in more, "checkpoint_every": 2 if "checkpoints" in more else None}
    settings |= {"scale": 0.0 if "scale 0" in more else 0.7, "keeps_y": "state" in more or "second" in more}
    found = simulated(
        functools.partial(delta_scan_with, gpu.delta_scan), *arrays, spans=3 if "spans" in more else 1, **settings
    )
    compare(found, exactly(functools.partial(delta_scan_with, chunk_scan_by_einsum.delta_scan), *arrays, **settings))


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    ("decay", "t", "key_dim", "value_dim", "heads", "more"),
    [
        ("none", 128, 64, 64, (1, 2), "queries"),
        ("none", 128, 64, 64, (1, 2), "second reverse strict"),
        ("none", 128, 64, 64, (1, 2), "second scale 0"),
        ("head", 192, 64, 40, (1, 1), "queries documents state dots checkpoints"),
        ("head", 192, 64, 64, (1, 1), "second documents state dots reverse strict"),
        pytest.param("head", 128, 128, 128, (1, 1), "queries reverse state dots", marks=SLOW),
        pytest.param("head", 128, 192, 64, (1, 1), "queries documents state dots", marks=SLOW),
        pytest.param("head", 128, 192, 64, (1, 1), "second documents state dots", marks=SLOW),
    ],
)
def test_two_scans_in_one(decay, t, key_dim, value_dim, heads, more):
    few, many = heads
    chunks = some_chunks(t, many, key_dim, decay, "documents" in more, 0.1)
    given = {}
    if "queries" in more:
        given["second_q"] = rows(t, many, key_dim, 5)
    else:
        given["second"] = (rows(t, few, key_dim, 6), rows(t, many, value_dim, 7))
    if "state" in more:
        given["initial_state"] = jnp.asarray(
            np.random.default_rng(9).normal(size=(1, many, key_dim, value_dim)), jnp.float32
        )
    if "dots" in more:
        given["dot_with"] = rows(t, few, value_dim, 4)
    if "dots" in more and "queries" in more:
        given["second_dot_with"] = rows(t, many, value_dim, 8)
    arrays = (rows(t, many, key_dim, 1), rows(t, few, key_dim, 2), rows(t, many, value_dim, 3), chunks, given)
    settings = {"heads": many, "scale": -0.7, "second_scale": 0.0 if "scale 0" in more else -0.6}
    settings |= {"reverse": "reverse" in more, "strict": "strict" in more}
    settings |= {"checkpoint_every": 2 if "checkpoints" in more else None}
    found = simulated(functools.partial(paired_with, gpu.scan), *arrays, **settings)
    compare(found, exactly(functools.partial(paired_with, chunk_scan_by_einsum.scan), *arrays, **settings))


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    ("decay", "t", "key_dim", "value_dim", "heads", "strength", "more"),
    [
        ("none", 64, 64, 64, (1, 1), 0, "strong"),
        ("none", 128, 40, 20, (1, 2), 0, "strength"),
        ("head", 128, 64, 128, (1, 1), 0.1, "documents strength strong"),
        ("key", 64, 64, 64, (1, 1), 0.1, "documents"),
        ("key", 64, 64, 64, (1, 1), 6.0, "strength"),
        ("key", 128, 64, 40, (1, 2), 6.0, "strength sums"),
        ("key", 64, 128, 64, (1, 1), 0.1, "sums"),
        pytest.param("head", 128, 128, 128, (1, 2), 6.0, "", marks=SLOW),
        pytest.param("none", 64, 256, 256, (1, 1), 0, "documents", marks=SLOW),
        pytest.param("key", 64, 192, 256, (1, 1), 0.1, "strength documents", marks=SLOW),
    ],
)
def test_solve_and_its_transpose(decay, t, key_dim, value_dim, heads, strength, more):
    few, many = heads
    chunks = some_chunks(t, many, key_dim, decay, "documents" in more, strength)
    small = key_dim**-0.5
    e, k = rows(t, many, key_dim, 1, (1.5 if "strong" in more else 0.5) * small), rows(t, few, key_dim, 2, small)
    v, strengths = rows(t, many, value_dim, 3), jnp.asarray(np.random.default_rng(5).random((1, t, many)), jnp.float32)
    decay_steps, summed = None, chunks
    if "sums" in more:
        decay_steps = jnp.diff(chunks.total.reshape(1, -1, C, many, key_dim), axis=2, prepend=0).reshape(
            chunks.total.shape
        )
        decay_steps = decay_steps.at[:, 3].add(-9)  # some beyond what is clamped
        chunks = dataclasses.replace(chunks, total=None)
    given = (e, k, v, chunks, strengths if "strength" in more else None, decay_steps)
    found = simulated(functools.partial(solve_with, gpu.solve), *given, heads=many)
    exact = exactly(functools.partial(solve_with, chunk_scan_by_einsum.solve), *given, heads=many)
    assert (found.total is None) == (exact.total is None)
    if found.total is not None:
        np.testing.assert_allclose(found.total, exact.total, rtol=1e-6, atol=1e-6)
        chunks = dataclasses.replace(summed, total=found.total)
    bar = 0.005 if decay == "key" else 0.002  # of a decay by channel the triangle is rounded, and e times its decay
    for name in ("w", "u", "inverse"):
        assert getattr(found, name).shape == getattr(exact, name).shape, name
        assert error(getattr(found, name), getattr(exact, name)) < bar, (
            name,
            error(getattr(found, name), getattr(exact, name)),
        )
    assert simulated(functools.partial(solve_with, gpu.solve), *given, heads=many, keeps=False).inverse is None
    given = (found.inverse, rows(t, few, key_dim, 4), k, v, chunks)
    found = simulated(gpu.solve_transposed, *given, heads=many, scale=0.7)
    exact = exactly(chunk_scan_by_einsum.solve_transposed, *given, heads=many, scale=0.7)
    for name in ("w", "u"):
        assert getattr(found, name).shape == getattr(exact, name).shape, name
        assert error(getattr(found, name), getattr(exact, name)) < bar, (
            name,
            error(getattr(found, name), getattr(exact, name)),
        )


@pytest.mark.gpu_interpreter
def test_another_documents_values_change_no_bit():
    t, size = 128, 64
    chunks = some_chunks(t, 1, size, "head", True, 0.1)
    first = np.asarray(chunks.segments) == 1
    given = [rows(t, 1, size, seed) for seed in range(3)]
    loud = [jnp.where(first[:, :, None, None], jnp.bfloat16(1e4), x) for x in given]
    run = functools.partial(scan_with, gpu.scan, state=None, dot_with=None, heads=1)
    quiet, other = (simulated(run, *arrays, chunks) for arrays in (given, loud))
    assert (np.asarray(quiet.o) != np.asarray(other.o))[first].any()
    np.testing.assert_array_equal(np.asarray(quiet.o, np.float32)[~first], np.asarray(other.o, np.float32)[~first])


@pytest.mark.parametrize("program", [p for p in programs.PROGRAMS if p.quick], ids=lambda program: program.name)
def test_lowers_for_cuda(program):
    lowered = compile_ahead.lower_for_cuda(program.function, *program.arguments, limit=60)
    assert "mosaic_gpu" in lowered.as_text()


def test_exponentials_are_taken_once_a_side():
    """Two per channel and token, of 64 x 64 in a warpgroup of 128 threads, and a few for the state and for marks."""
    (program,) = [p for p in programs.PROGRAMS if p.name == "linear_recurrence gpu scan key k128 v128 h16"]
    try:
        report = compile_ahead.report("h100", program.function, *program.arguments)
    except compile_ahead.NotInstalled as missing:
        pytest.skip(str(missing))
    assert program.complaints(report) == []
    assert 64 <= report.kernels[0].special <= programs.EXPONENTIALS


def test_spans_fill_the_device_and_read_only_what_they_must(monkeypatch):
    launched = []

    def launch(plan, inputs):
        launched.append((plan, set(inputs)))
        return {name: jnp.zeros(made.shape, made.dtype) for name, made in plan.results().items()}

    monkeypatch.setattr(gpu_body, "launch", launch)
    row = jax.ShapeDtypeStruct((2, 16384, 16, 128), jnp.bfloat16)
    with dispatch.aimed_at("gpu", "NVIDIA H100 80GB HBM3"):
        jax.eval_shape(functools.partial(linear_recurrence, backend="pallas_gpu"), row, row, row)
        jax.eval_shape(
            lambda q, k, v, e: linear_recurrence(q, k, v, erase_read=e, backend="pallas_gpu"), row, row, row, row
        )
    read = [inputs for _, inputs in launched]
    assert read == [{"k", "v"}, {"q", "k", "v", "initial"}, {"w", "k", "v"}, {"q", "w", "k", "v", "initial"}]
    assert [plan.states_only for plan, _ in launched] == [True, False, True, False]
    assert all(
        plan.spans == 2 and plan.splits == (4 if "q" not in inputs and "w" in inputs else 2)
        for plan, inputs in launched
    )


def test_bytes_of_a_long_call_in_spans():
    """q, k, v and o once are 0.54 GB; k and v are read again where states are found."""
    try:
        compilers.files("cuda")
    except compilers.NotInstalled as error:
        pytest.skip(str(error))
    (program,) = [
        one for one in all_programs(only="recurrence no decay forward b2 t16384") if one.backend == "pallas_gpu"
    ]
    report = compile_ahead.report("h100", program.function, *program.arguments)
    assert not report.complaints()
    assert 0.7e9 < work_of(report.compiled.as_text()).bytes < 0.85e9


def test_refuses_with_a_reason():
    assert gpu.refuses(192, 256, jnp.bfloat16, "key", True) is None
    assert gpu.refuses(256, 256, jnp.bfloat16, "head", True) is None
    assert "bfloat16; this is float32" in gpu.refuses(64, 64, jnp.float32, "none", False)
    assert "key size above 192" in gpu.refuses(256, 64, jnp.bfloat16, "key", False)
    assert "value size above 256" in gpu.refuses(64, 512, jnp.bfloat16, "head", False)
    assert "delta rule" in gpu.refuses(64, 64, jnp.bfloat16, "value", True)
    x = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(ValueError, match=r"cannot serve q: .* float32"):
        gpu.scan(x, x, x, Chunks(C), heads=1)
    x = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="chunks of 64; these are of 32"):
        gpu.scan(x, x, x, Chunks(32), heads=1)
    wide = jnp.zeros((1, 64, 1, 320), jnp.bfloat16)
    with pytest.raises(ValueError, match="key size above 256"):
        gpu.scan(wide, wide, x, Chunks(C), heads=1)


@pytest.mark.parametrize(
    ("version", "refused"),
    [(12060, False), (12080, True), (12090, True), (12091, False), (13000, False), (None, False)],
)
def test_refuses_cuda_versions_that_miscompile_masks(version, refused, monkeypatch):
    import jax._src.lib

    library = None if version is None else types.SimpleNamespace(cuda_runtime_get_version=lambda: version)
    monkeypatch.setattr(jax._src.lib, "cuda_versions", library)
    reason = gpu.refuses(64, 64, jnp.bfloat16, "none", False)
    assert reason == (
        f"ptxas of CUDA 12.8.0 to 12.9.0 miscompiles masks; this is CUDA 12.{version // 10 % 100}" if refused else None
    )
