"""Landmark attention: the forms against a slow oracle and each other, and retrieval against its rule."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels.landmark_attention import (
    landmark_attention,
    landmark_schedule,
    previous_blocks,
    retrieve_blocks,
)
from tests.pallas_kernels import landmark_oracle
from tests.pallas_kernels.landmark_arguments import (
    CLOSE,
    PACKED,
    arrays,
    error,
    fields,
    oracle_weights,
    packed_fields,
    plain,
    rotate,
    rows,
    weights_of,
)


@pytest.mark.parametrize("case", ["plain", "packed", "suffix"])
def test_the_specification_is_the_oracle(case):
    if case == "suffix":
        q, k, v = arrays(3, 6, 4, 2, s=27)
        f = fields(PACKED, queries=6)
    else:
        q, k, v = arrays(3, 27, 2, 1)
        f = plain(3, 27) if case == "plain" else fields(PACKED)
    expected = oracle_weights(q, k, 4, f)
    given = dict.fromkeys(f) if case == "plain" else f
    with jax.enable_x64(True):
        found = weights_of(*(np.asarray(x, np.float64) for x in (q, k)), given)
        assert np.max(np.abs(found - expected)) < 1e-12
    repeated = np.repeat(np.asarray(v, np.float64), q.shape[2] // v.shape[2], axis=2)
    out = jax.jit(functools.partial(landmark_attention, block=4, backend="reference"))(q, k, v, **given)
    assert error(out, np.einsum("bhts,bshv->bthv", expected, repeated)) < 1e-6


def test_what_the_weights_are():
    q, k, _ = arrays(3, 27, 2, 2)
    f = fields(PACKED)
    w = weights_of(q, k, f)
    positions, segments = np.asarray(f["query_positions"]), np.asarray(PACKED)
    real, landmark = segments != 0, (positions % 5 == 4) & (segments != 0)
    np.testing.assert_allclose(w.sum(-1), np.broadcast_to(real[:, None], w.shape[:3]), atol=1e-6)
    assert np.all(w[np.broadcast_to(landmark[:, None, None], w.shape)] == 0)  # no value of a landmark is read
    later = positions[:, None, :] > positions[:, :, None]
    assert np.all(w[np.broadcast_to((later | (segments[:, :, None] != segments[:, None, :]))[:, None], w.shape)] == 0)
    seen = (segments[:, :, None] == segments[:, None, :]) & real[:, :, None] & ~later & ~landmark[:, None, :]
    assert np.all(w[np.broadcast_to(seen[:, None], w.shape)] > 0)  # and everything else is
    # In a document's first block: plain causal softmax over ordinary tokens.
    scores = np.einsum("thk,shk->hts", np.asarray(q)[2, :5], np.asarray(k)[2, :4]) * 8**-0.5
    for i in range(5):
        e = np.exp(scores[:, i, : min(i, 3) + 1])
        np.testing.assert_allclose(w[2, :, i, : e.shape[1]], e / e.sum(-1, keepdims=True), rtol=1e-5)


def test_a_landmark_gates_its_block_and_nothing_else():
    """Raising one landmark's key towards the query moves weight into its block; inside the block shares stay; its
    own block never asks it."""
    q, k, _ = arrays(1, 15, 1, 1)
    before, after = (weights_of(q, keys, plain(1, 15))[0, 0] for keys in (k, k.at[0, 4].add(0.5 * q[0, 12])))
    assert after[12, :4].sum() > before[12, :4].sum()
    np.testing.assert_allclose(after[12, :4] / after[12, :4].sum(), before[12, :4] / before[12, :4].sum(), rtol=1e-5)
    np.testing.assert_array_equal(after[:5], before[:5])


@functools.partial(jax.jit, static_argnames=("block", "backend"))
def results(q, k, v, f, *, block, backend):
    def loss(q, k, v):
        out, lse = landmark_attention(q, k, v, block=block, backend=backend, return_lse=True, **f)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        sums = [jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)) for x in (out, finite)]
        return sums[0] + 0.3 * sums[1], (out, lse)

    gradients, outs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return (*outs, *gradients)


@functools.partial(jax.jit, static_argnames=("block", "backend"))
def self_results(q, k, v, positions, segments, *, block, backend):
    """The layer's call: the very same arrays for queries and keys."""
    f = {"query_positions": positions, "key_positions": positions, "query_segments": segments, "key_segments": segments}
    return results.__wrapped__(q, k, v, f, block=block, backend=backend)


def assert_agree(found, expected):
    for name, a, b in zip(("out", "lse", "q", "k", "v"), found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        assert name == "lse" or np.all(np.isfinite(a)), name
        finite = np.isfinite(b)
        assert error(np.where(finite, a, 0), np.where(finite, b, 0)) < CLOSE, name


@pytest.mark.parametrize(("t", "block"), [(1, 4), (13, 1), (30, 7), pytest.param(63, 100, marks=pytest.mark.wide)])
def test_xla_is_the_specification_in_one_document(t, block):
    q, k, v = arrays(2, t, 4, 2)
    assert_agree(*(results(q, k, v, {}, block=block, backend=backend) for backend in ("xla", "reference")))


def test_xla_is_the_specification_over_documents():
    q, k, v = arrays(3, 27, 4, 2)
    f = fields(PACKED)
    banded, expected = (
        self_results(q, k, v, f["key_positions"], PACKED, block=4, backend=backend) for backend in ("xla", "reference")
    )
    assert_agree(banded, expected)
    assert_agree(
        results(q, k, v, f, block=4, backend="xla"), expected
    )  # separate arrays: another path, the one for caches


@pytest.mark.parametrize(("queries", "heads"), [(1, 4), (6, 4)])
def test_xla_is_the_specification_against_a_cache(queries, heads):
    """A few queries, the last of their rows, against all keys and some slots that are free; one alone reads keys
    where they lie."""
    q, k, v = arrays(3, queries, heads, 1, s=32)
    f = fields(PACKED, queries=queries)
    f = {name: jnp.pad(x, ((0, 0), (0, 5))) if name.startswith("key") else x for name, x in f.items()}
    assert_agree(*(results(q, k, v, f, block=4, backend=backend) for backend in ("xla", "reference")))


def test_a_stream_is_the_whole():
    """Ten tokens, then nine against all keys so far, then one after another: what the whole row gives at once."""
    q, k, v = arrays(2, 24, 4, 2)
    whole = jax.jit(functools.partial(landmark_attention, block=4))(q, k, v)
    step = jax.jit(functools.partial(landmark_attention, block=4))
    for start, end in ((0, 10), (10, 20), (20, 21), (23, 24)):
        places = jnp.broadcast_to(jnp.arange(24), (2, 24))
        stored = jnp.where(places < end, 1, 0)
        part = {
            "query_positions": places[:, start:end],
            "key_positions": places,
            "query_segments": stored[:, start:end],
            "key_segments": stored,
        }
        assert error(step(q[:, start:end], k, v, **part), whole[:, start:end]) < 1e-6


@pytest.mark.parametrize("documents", [True, pytest.param(False, marks=pytest.mark.wide)])
def test_pieces_and_walks_change_nothing(monkeypatch, documents):
    """Lengths that are cut in pieces, and pieces that are walked through, have smaller sizes here."""
    inputs = arrays(1, 45, 2, 1)
    f = packed_fields(rows([24, -3, 18])) if documents else {}
    expected = results(*inputs, f, block=4, backend="reference")
    monkeypatch.setattr(previous_blocks, "QUERIES", 13)
    monkeypatch.setattr(previous_blocks, "SMALLEST_PART", 24)
    fresh = jax.jit(results.__wrapped__, static_argnames=("block", "backend"))
    assert_agree(fresh(*inputs, f, block=4, backend="xla"), expected)


@pytest.mark.wide
@pytest.mark.parametrize(("t", "block"), [(257, 50), (1000, 63), (1000, 8)])
def test_xla_is_the_specification_at_length(t, block):
    inputs = arrays(1, t, 2, 1)
    for f in ({}, packed_fields(rows([t // 2, -9, t - t // 2 - 9]))):
        assert_agree(*(results(*inputs, f, block=block, backend=backend) for backend in ("xla", "reference")))


@settings(max_examples=2, deadline=None, database=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 2), st.integers(1, 45), st.data())
def test_xla_is_the_specification_anywhere(b, t, g, r, block, data):
    segments = np.zeros((b, t), np.int32)
    for row in segments:
        start, number = 0, 1
        while start < t:
            size = data.draw(st.integers(1, t - start))
            row[start : start + size] = number * data.draw(st.integers(0, 3).map(bool))
            start, number = start + size, number + 1
    f = packed_fields(jnp.asarray(segments))
    found, expected = (
        results(*arrays(b, t, g * r, g), f, block=block, backend=backend) for backend in ("xla", "reference")
    )
    for name, a, c in zip(("out", "lse", "q", "k", "v"), found, expected, strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(c))
        a, c = (np.where(np.isfinite(c), x, 0) for x in (a, c))
        assert error(a, c) < 1e-5 or np.sqrt(np.mean((a - c) ** 2)) < 1e-6, (
            name
        )  # of single tokens gradients are rounding alone


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_padding_full_of_nan_touches_nothing(backend):
    f = fields(PACKED)
    real = (PACKED != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0) for x in arrays(3, 27, 4, 2))
    dirty = tuple(jnp.where(real, x, jnp.nan) for x in clean)
    expected, found = (self_results(*x, f["key_positions"], PACKED, block=4, backend=backend) for x in (clean, dirty))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.all(np.asarray(found[0])[np.asarray(PACKED) == 0] == 0) and np.all(
        np.asarray(found[1])[np.asarray(PACKED) == 0] == -np.inf
    )


def test_half_precision_stays_near():
    half = tuple(x.astype(jnp.bfloat16) for x in arrays(2, 41, 2, 2))
    expected = results(*(x.astype(jnp.float32) for x in half), {}, block=4, backend="reference")
    for index, (a, b) in enumerate(zip(results(*half, {}, block=4, backend="xla"), expected, strict=True)):
        assert a.dtype == (jnp.float32 if index == 1 else jnp.bfloat16)
        assert error(a, b) < (0.005 if index < 2 else 0.01)


def ranked_and_read(q, k, v, f, *, block, top, window=1, rotate=rotate, query_chunk=16):
    how = {"rotate": rotate, "window": window, "query_chunk": query_chunk, **f}
    return retrieve_blocks(q, k, v, landmark_schedule(q, k, block=block, top=top, **how), **how)


retrieved = jax.jit(ranked_and_read, static_argnames=("block", "top", "window", "query_chunk"))


@functools.partial(jax.jit, static_argnames="block")
def trained(q, k, v, f, block):
    return landmark_attention(
        rotate(q, f["query_positions"]), rotate(k, f["key_positions"]), v, block=block, backend="reference", **f
    )


def test_reading_all_blocks_is_the_training_form():
    q, k, v = arrays(3, 27, 4, 2)
    f = fields(PACKED)
    assert error(retrieved(q, k, v, f, block=4, top=100), trained(q, k, v, f, block=4)) < 1e-5  # more than there are


def test_queries_with_few_earlier_blocks_read_them_all():
    q, k, v = arrays(1, 41, 2, 2)
    f = plain(1, 41)
    found, expected = retrieved(q, k, v, f, block=4, top=3), trained(q, k, v, f, block=4)
    assert error(found[:, :20], expected[:, :20]) < 1e-5  # blocks 0 to 3 come before position 20
    assert np.min(np.abs(np.asarray(found[:, 20:24] - expected[:, 20:24])).max(axis=(2, 3))) > 1e-3


@pytest.mark.parametrize(("top", "queries", "window"), [(1, None, 1), (3, 9, 1), (2, None, 3)])
def test_retrieval_is_the_oracles(top, queries, window):
    segments = rows([41], [14, 24, -3])
    q, k, v = arrays(2, 41 if queries is None else queries, 4, 2, s=41)
    f = fields(segments, queries)
    numbers = {name: np.asarray(x) for name, x in f.items()}
    expected, furthest = landmark_oracle.retrieval(
        q,
        k,
        v,
        4,
        top,
        8**-0.5,
        *(numbers[name] for name in ("query_positions", "key_positions", "query_segments", "key_segments")),
        window,
    )
    assert furthest < (top + 1 + window) * 5
    assert error(retrieved(q, k, v, f, block=4, top=top, window=window), expected) < 1e-5


def test_among_equal_landmark_keys_the_oldest_blocks_are_read():
    """As in a model's first layer; whatever the keys, and however many queries there are at once."""
    q, k, _ = arrays(2, 61, 4, 2)
    f = plain(2, 61)
    k = k.at[:, 4::5].set(k[:, 4:5])
    how = {"block": 4, "top": 2, "rotate": rotate}
    schedule = jax.jit(lambda q, k: landmark_schedule(q, k, **how, **f))(q, k)
    last = {name: x[:, -1:] if name.startswith("query") else x for name, x in f.items()}
    one = jax.jit(lambda q, k: landmark_schedule(q, k, **how, **last))(q[:, -1:], k)
    # Of 12 blocks the newest two are ranked where they are; the ten others share one key and one position.
    for index in (schedule.index[:, -1], one.index[:, 0]):
        older = [set(map(int, head)) - {10, 11} for head in np.asarray(index).reshape(-1, 2)]
        assert all(blocks == set(range(len(blocks))) for blocks in older) and any(older)


def test_no_position_past_the_trained_range_counts():
    """Gathered keys and the queries that meet them are turned by stingy positions; true positions matter for near
    pairs only."""
    q, k, v = arrays(1, 61, 2, 2)
    f, top, c = plain(1, 61), 2, 5
    limit, start = (top + 2) * c, (top + 1) * c
    late = {
        name: x[:, start:] if name.startswith("query") else x for name, x in f.items()
    }  # more than `top` earlier blocks

    def run(q):
        seen = []

        def recording(x, positions):
            seen.append((x.ndim, positions))
            return rotate(x, positions)

        out = ranked_and_read(q, k, v, late, block=4, top=top, rotate=recording, query_chunk=100)
        return out, [p for ndim, p in seen if ndim > 5], [p for ndim, p in seen if ndim == 4 and p.shape == q.shape[:2]]

    out, gathered, queries = jax.jit(run)(q[:, start:])
    assert gathered and max(int(positions.max()) for positions in gathered) < limit
    assert (
        len(queries) == 4 and min(int(positions.max()) for positions in queries) < limit
    )  # true and stingy ones, to rank and to read

    # The last query's scores with keys whose true position is neither near it nor in the trained range never count.
    def spoiling(x, positions):
        near = (positions < limit) | (positions > 60 - limit)
        return jnp.where(near[..., None, None], rotate(x, positions), jnp.nan)

    last = {name: x[:, -1:] if name.startswith("query") else x for name, x in f.items()}
    spoiled = jax.jit(lambda q: ranked_and_read(q, k, v, last, block=4, top=top, rotate=spoiling))(q[:, -1:])
    assert error(spoiled, out[:, -1:]) < 1e-6

    # And those near it see relative positions only: moving all rotations alike changes nothing (but rounding of larger
    # angles).
    def moved(x, positions):
        return rotate(x, positions + 100)

    assert (
        error(jax.jit(lambda q: ranked_and_read(q, k, v, last, block=4, top=top, rotate=moved))(q[:, -1:]), out[:, -1:])
        < 1e-4
    )


def test_the_number_of_queries_at_once_does_not_matter():
    q, k, v = arrays(2, 41, 2, 1)
    f = fields(rows([41], [14, 24, -3]))
    expected = retrieved(q, k, v, f, block=4, top=2, query_chunk=100)
    assert error(retrieved(q, k, v, f, block=4, top=2, query_chunk=7), expected) < 1e-6
    few = {name: x[:, 30:31] if name.startswith("query") else x for name, x in f.items()}
    assert error(retrieved(q[:, 30:31], k, v, few, block=4, top=2), expected[:, 30:31]) < 1e-6


def test_retrieval_has_finite_gradients_and_ignores_padding():
    segments = rows([-2, 30, -1, 8], [3, -38])
    f = fields(segments)
    real = (segments != 0)[:, :, None, None]
    clean = tuple(jnp.where(real, x, 0.0) for x in arrays(2, 41, 2, 1))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(retrieved(q, k, v, f, block=4, top=2)))

    gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    expected = gradient_of(*clean)
    assert all(np.all(np.isfinite(x)) and np.any(np.asarray(x) != 0) for x in expected)
    jax.tree.map(np.testing.assert_array_equal, gradient_of(*(jnp.where(real, x, jnp.nan) for x in clean)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 6, 8))}, "four dimensions"),
        ({"k": jnp.zeros((2, 6, 2, 7))}, r"k must be \(2, s, g, 8\)"),
        ({"v": jnp.zeros((2, 5, 2, 5))}, r"v must be \(2, 6, 2\)"),
        ({"k": jnp.zeros((2, 6, 3, 8)), "v": jnp.zeros((2, 6, 3, 5))}, "no multiple"),
        ({"block": 0}, "block must be at least 1; got 0"),
        ({"query_positions": jnp.zeros(6, jnp.int32)}, "query_positions must be"),
        ({"key_segments": jnp.zeros((2, 7), jnp.int32)}, "key_segments must be"),
        ({"key_segments": jnp.ones((2, 6), jnp.int32)}, "must be given together"),
        ({"query_positions": jnp.zeros((2, 6))}, "query_positions must be integers; got float32"),
        ({"k": jnp.zeros((2, 0, 2, 8)), "v": jnp.zeros((2, 0, 2, 5))}, "at least one token"),
        ({"backend": "pallas_tpu"}, "pallas_tpu cannot serve this call: it runs on TPUs"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    given = {
        "q": jnp.zeros((2, 6, 4, 8)),
        "k": jnp.zeros((2, 6, 2, 8)),
        "v": jnp.zeros((2, 6, 2, 5)),
        "block": 2,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(landmark_attention)(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_reading_no_blocks_is_refused():
    q, k, v = arrays(1, 6, 2, 2)
    with pytest.raises(ValueError, match="top must be at least 1; got 0"):
        ranked_and_read(q, k, v, plain(1, 6), block=2, top=0)
