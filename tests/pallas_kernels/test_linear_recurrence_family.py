"""The whole family: decays per channel and of columns, erasing and grouped heads against the specification, forwards
and backwards."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels.dispatch import recorded_choices
from recollect.pallas_kernels.linear_recurrence import (
    Recurrence,
    chunk_matrices,
    column_decay_vjp,
    kernel_vjp,
    linear_recurrence_step,
)
from recollect.pallas_kernels.linear_recurrence.canonical import run_canonical
from recollect.pallas_kernels.linear_recurrence.chunk_scan import ScanKernels
from tests.pallas_kernels import chunk_scan_by_einsum
from tests.pallas_kernels.test_linear_recurrence import (
    CLOSE,
    as_arrays,
    documents,
    error,
    exactly,
    linear_recurrence,
    results,
)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mixed(rng, shape):
    kind = rng.random(shape)
    return np.where(kind < 0.3, -30, np.where(kind < 0.6, 0, -0.1)).astype(np.float32)


def arguments(t, decay, erase, with_state, with_segments, columns=None, before=False, b=2, h=2, hk=1, k=6, v=5):
    """decay: None, "token", "channel", or "mixed", channels of which some lose everything at once and some nothing;
    "strong", tokens like
    that. erase: None, "scalar" strengths, "vector" ones, or "apart", with a key of its own. columns: the same as decay
    for value_log_decay, None, "channel" or "mixed". before: whether the erase reads the undecayed state."""
    rng = np.random.default_rng(t)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    keys = unit(normal(b, t, hk, k)).astype(np.float32)
    given: dict = {"q": normal(b, t, hk, k), "k": keys, "v": normal(b, t, h, v)}
    fixed: dict = {}
    if decay == "token":
        given["log_decay"] = -rng.exponential(0.3, (b, t, h)).astype(np.float32)
    elif decay == "channel":
        given["log_decay"] = -rng.exponential(0.5, (b, t, h, k)).astype(np.float32)
    elif decay == "mixed":
        given["log_decay"] = mixed(rng, (b, t, h, k))
    elif decay == "strong":
        given["log_decay"] = mixed(rng, (b, t, h))
    if columns == "channel":
        given["value_log_decay"] = -rng.exponential(0.5, (b, t, h, v)).astype(np.float32)
    elif columns == "mixed":
        given["value_log_decay"] = mixed(rng, (b, t, h, v))
    if before:
        fixed["erase_before_decay"] = True
    if erase:
        strength = rng.random((b, t, h, 1 if erase == "scalar" else k)).astype(np.float32)
        given["erase_read"] = strength * np.repeat(keys, h // hk, axis=2)
        given["write_strength"] = strength[..., 0] if erase == "scalar" else rng.random((b, t, h, v)).astype(np.float32)
        if erase == "apart":
            given["erase_write"] = unit(normal(b, t, h, k)).astype(np.float32)
    if with_state:
        given["initial_state"] = normal(b, h, k, v)
    if with_segments:
        fixed["segment_ids"] = documents(b, t)
        if with_state:
            first = [row[row != 0][0] for row in fixed["segment_ids"]]
            fixed["initial_segment"] = np.array([first[0], *[2] * (b - 1)], np.int32)
    return given, fixed


def compare(run, given, fixed, close):
    (o, state), gradients = results(functools.partial(run, scale=0.7, return_state=True), given, fixed)
    (o_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=0.7, return_state=True, backend="reference"), given, fixed
    )
    assert error(o, o_) < close and error(state, state_) < close
    assert set(gradients) == set(gradients_) == set(given)
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < close, name


CASES = [
    # t, chunk, decay, erase, state, segments
    (1, None, "token", "scalar", True, True),
    (63, 10, "channel", None, True, True),
    (63, 16, None, "scalar", False, False),
    (63, 16, "token", "scalar", True, True),
    (63, 32, "channel", "apart", True, True),
    (65, 64, "mixed", None, True, True),
    (5, None, "mixed", "apart", False, False),
    (130, 64, "channel", "vector", True, True),
]
BEFORE_DECAY = [
    # t, chunk, decay, erase, state, segments, columns, erase before decay
    (1, None, "token", "scalar", True, True, None, True),
    (63, 16, None, "scalar", True, True, None, True),
    (63, 16, "token", "scalar", True, True, None, True),
    (65, 64, "strong", "scalar", True, True, None, True),
    (63, 32, "channel", "apart", True, True, None, True),
    (5, None, "mixed", "apart", False, False, None, True),
    (130, 64, "mixed", "vector", True, True, None, True),
]
COLUMNS = [
    (1, None, None, None, True, True, "channel"),
    (63, 10, None, None, True, True, "channel"),
    (5, None, None, None, False, False, "mixed"),
    (130, 64, "token", None, True, True, "mixed"),
    (65, 32, "mixed", None, True, True, "mixed"),
]
WIDE = [
    (1000, None, decay, erase, True, True, columns, erase is not None and columns is None)
    for decay, erase, columns in (
        ("token", None, None),
        ("channel", None, None),
        ("mixed", "vector", None),
        ("token", "apart", None),
        ("mixed", None, "mixed"),
    )
]
WIDE += [(1000, None, decay, erase, True, True) for decay, erase in (("mixed", "vector"), ("token", "apart"))]


@pytest.mark.parametrize(
    "case",
    [*CASES, *BEFORE_DECAY, *COLUMNS, *(pytest.param(case, marks=pytest.mark.wide) for case in WIDE)],
    ids=lambda case: " ".join(map(str, case)),
)
def test_xla_is_the_recurrence(case):
    t, chunk, *kind = case
    compare(functools.partial(linear_recurrence, chunk_size=chunk, backend="xla"), *arguments(t, *kind), CLOSE)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize(
    "kind",
    [("channel", None, True, True, "channel"), ("channel", "apart", True, True, None, True)],
    ids=["columns", "erase before decay"],
)
def test_padding_full_of_nan_touches_nothing(backend, kind):
    given, fixed = arguments(63, *kind, hk=2)
    real = fixed["segment_ids"] != 0
    run = functools.partial(linear_recurrence, return_state=True, chunk_size=16, backend=backend)

    def filled(value):
        return {
            name: x if name == "initial_state" else np.where(real[:, :, None, None], x, value)
            for name, x in given.items()
        }

    clean, dirty = (results(run, filled(np.float32(value)), fixed) for value in (0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.all(np.isfinite(dirty[0][1]))
    for name in given.keys() - {"initial_state"}:
        assert np.all(np.asarray(dirty[1][name])[~real] == 0), name


def test_erasing_after_the_decay_is_another_recurrence():
    """With e = beta k exp(-g) the two agree, up to the gates that fp32 can divide by; with the same e they differ."""
    given, fixed = arguments(21, "token", "scalar", True, True)
    divided = given | {"erase_read": given["erase_read"] * np.exp(-given["log_decay"])[..., None]}
    o, after, divided_o = (
        linear_recurrence(**x, **fixed, erase_before_decay=before)[0]
        for x, before in ((given, True), (given, False), (divided, False))
    )
    assert error(divided_o, o) < CLOSE and error(after, o) > 0.01


def test_columns_that_decay_and_are_erased_are_served_by_the_reference():
    given, fixed = arguments(21, "channel", "apart", True, True, "channel")
    o, state = linear_recurrence(**given, **fixed, return_state=True)
    after = given.pop("initial_state")
    o_, state_ = linear_recurrence(**given, **fixed, initial_state=after, return_state=True, backend="reference")
    assert error(o, o_) < CLOSE and error(state, state_) < CLOSE
    with pytest.raises(ValueError, match=r"linear_recurrence.*xla.*value_log_decay.*erase_read"):
        linear_recurrence(**given, **fixed, backend="xla")


def kernels_of_16(paired_scan=None):
    """Scans in plain jnp over chunks of 16 tokens."""
    scans = (
        chunk_scan_by_einsum.scan,
        chunk_scan_by_einsum.delta_scan,
        chunk_scan_by_einsum.solve,
        chunk_scan_by_einsum.solve_transposed,
    )
    return ScanKernels(*scans, lambda *_: 16, paired_scan=paired_scan)


def by_scans(run, return_state=False, **inputs):
    return run_canonical(functools.partial(run, return_state=return_state), Recurrence(**as_arrays(inputs)))


@pytest.mark.parametrize(
    ("case", "paired_scan"),
    [
        ((63, None, None, False, False), None),
        ((63, "token", None, True, True), None),
        ((63, "channel", None, True, True), None),
        ((63, None, "scalar", True, True), None),
        ((63, None, "scalar", True, True), chunk_scan_by_einsum.scan),
        ((63, "token", "vector", True, True), None),
        ((63, "token", "scalar", True, True), chunk_scan_by_einsum.scan),
        ((100, "channel", "vector", True, True), None),
        ((63, "strong", "scalar", True, True, None, True), None),
        ((100, "channel", "vector", True, True, None, True), None),
        ((63, "token", "apart", True, True), None),
        ((63, "channel", "apart", False, True, None, True), None),
    ],
    ids=lambda case: " ".join(map(str, case)) if isinstance(case, tuple) else "paired" if case else "separate",
)
def test_gradients_are_chunk_scans(case, paired_scan, monkeypatch):
    """The mathematics that kernel backends share, on scans in plain jnp; the decay's gradient starts afresh every 32
    tokens."""
    monkeypatch.setattr(kernel_vjp, "GROUP", 32)
    monkeypatch.setattr(kernel_vjp, "CHANNEL_GROUP", 32)
    run = functools.partial(kernel_vjp.recurrence_by_scans, kernels_of_16(paired_scan))
    compare(functools.partial(by_scans, run), *arguments(*case), CLOSE)


@pytest.mark.parametrize("case", [(100, True, True), (63, False, False)], ids=str)
def test_gradients_of_decays_of_columns_are_chunk_scans(case, monkeypatch):
    monkeypatch.setattr(kernel_vjp, "CHANNEL_GROUP", 32)
    t, *kind = case
    given, fixed = arguments(t, None, None, *kind, "channel")
    given["write_strength"] = np.random.default_rng(1).random(given["v"].shape[:3], np.float32)
    run = functools.partial(column_decay_vjp.recurrence_by_scans, kernels_of_16())
    compare(functools.partial(by_scans, run), given, fixed, CLOSE)


@pytest.mark.parametrize(
    "kind",
    [
        (None, None),
        ("token", "scalar"),
        ("channel", "vector"),
        ("channel", "apart"),
        ("channel", None, "channel"),
        ("channel", "apart", None, True),
        ("token", "scalar", "channel", True),
    ],
    ids=str,
)
def test_steps_are_the_recurrence(kind):
    decay, erase, *more = kind
    given, fixed = arguments(9, decay, erase, True, False, *more)
    o, state = linear_recurrence(**given, **fixed, scale=0.7, return_state=True, backend="reference")
    after = given.pop("initial_state")
    for t in range(9):
        rows = as_arrays({name: x[:, t] for name, x in given.items()})
        o_t, after = linear_recurrence_step(as_arrays(after), **rows, **fixed, scale=0.7)
        assert error(o_t, o[:, t]) < CLOSE
    assert error(after, state) < CLOSE
    with pytest.raises(ValueError, match="linear_recurrence_step: state must be"):
        inspect.unwrap(linear_recurrence_step)(after[:, :1], **{name: x[:, 0] for name, x in given.items()})


def test_one_token_with_a_state_is_a_step():
    """It is advanced without a choice of backends; a state of another document is not read, and padding keeps it."""
    given, fixed = arguments(1, "token", "scalar", True, False, b=3)
    fixed |= {"segment_ids": np.array([[1], [2], [0]], np.int32), "initial_segment": np.ones(3, np.int32)}
    with recorded_choices() as choices:
        step = results(functools.partial(linear_recurrence, scale=0.7, return_state=True), given, fixed)
    assert not choices
    chunks = results(functools.partial(linear_recurrence, scale=0.7, return_state=True, backend="xla"), given, fixed)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), step, chunks)
    (o, state), _ = step
    assert not np.any(o[2])
    np.testing.assert_array_equal(state[2], given["initial_state"][2])


@functools.cache
def _compiled(chunk: int, kind: str):
    def run(q, k, v, g, state, extra, segments, first):
        return linear_recurrence(
            q,
            k,
            v,
            log_decay=g,
            initial_state=state,
            segment_ids=segments,
            initial_segment=first,
            return_state=True,
            chunk_size=chunk,
            **extra,
            erase_before_decay=kind == "erase before decay",
            backend="xla",
        )

    return jax.jit(run)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_and_gates(data):
    """Gates at their bounds and anywhere between, documents and padding wherever they fall."""
    t, chunk = data.draw(st.sampled_from([(1, 16), (11, 4), (11, 16)]))
    kind = data.draw(st.sampled_from(["write", "erase", "erase before decay", "columns"]))
    ids = [np.sort(data.draw(st.lists(st.integers(1, 3), min_size=t, max_size=t))) for _ in range(2)]
    gaps = np.array(data.draw(st.lists(st.booleans(), min_size=2 * t, max_size=2 * t))).reshape(2, t)
    segments = np.where(gaps, 0, np.array(ids)).astype(np.int32)
    first = np.array([data.draw(st.integers(0, 3)) for _ in range(2)], np.int32)
    first = np.minimum(first, np.where(segments == 0, 9, segments).min(axis=1)).astype(np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    q, k, v, state = (
        rng.normal(size=size).astype(np.float32) for size in ((2, t, 1, 3), (2, t, 1, 3), (2, t, 2, 4), (2, 2, 3, 4))
    )
    k = unit(k).astype(np.float32)
    g = -data.draw(st.sampled_from([0.0, 0.1, 8.0, 60.0])) * rng.random((2, t, 2, 3), np.float32)
    beta = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    e, w = beta * np.repeat(k, 2, 2), np.full((2, t, 2), beta, np.float32)
    c = -data.draw(st.sampled_from([0.1, 60.0])) * rng.random((2, t, 2, 4), np.float32)
    extra = {"write": {}, "columns": {"value_log_decay": jnp.asarray(c)}}.get(
        kind, {"erase_read": jnp.asarray(e), "write_strength": jnp.asarray(w)}
    )
    o, after = _compiled(chunk, kind)(q, k, v, g, state, extra, segments, first)
    more = {
        "initial_state": state,
        "segment_ids": segments,
        "initial_segment": first,
        "erase_before_decay": kind == "erase before decay",
    }
    o_, after_ = linear_recurrence(q, k, v, log_decay=g, return_state=True, **extra, **more, backend="reference")
    assert error(o, o_) < CLOSE and error(after, after_) < CLOSE


@pytest.mark.parametrize("c", [1, 5, 16])
def test_inverses_of_unit_triangles(c):
    lower = jnp.tril(jax.random.normal(jax.random.key(c), (3, c, c)), -1)
    exact = np.linalg.inv(np.eye(c) + np.asarray(lower, np.float64))
    weights = jax.random.normal(jax.random.key(1), lower.shape)
    for inverse in (chunk_matrices.unit_inverse, chunk_matrices.unit_inverse_by_ladder):
        assert error(jax.jit(inverse)(lower), exact) < CLOSE
    found = jax.jit(jax.grad(lambda x: jnp.sum(weights * chunk_matrices.unit_inverse(x))))(lower)
    expected = jax.grad(lambda x: jnp.sum(weights * jnp.linalg.inv(jnp.eye(c) + jnp.tril(x, -1))))(lower)
    assert error(found, expected) < 10 * CLOSE
