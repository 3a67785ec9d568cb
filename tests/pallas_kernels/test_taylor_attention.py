"""Taylor attention: its xla backend against the specification in fp64, and the specification against loops in numpy."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels import taylor_attention as operation
from recollect.pallas_kernels.taylor_attention import reference, taylor_attention_step
from recollect.pallas_kernels.taylor_attention.features import count, packed, selections
from tests.pallas_kernels.taylor_sums import (
    CLOSE,
    arguments,
    by_loops,
    compare,
    cuts_are_joined,
    error,
    exactly,
    features,
    halved,
    padding_is_inert,
    results,
    taylor_attention,
)


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_features_are_those_written_out(k):
    x = np.random.default_rng(k).normal(size=(4, k)).astype(np.float32)
    expected = np.stack([features(row.astype(np.float64)) for row in x])
    assert expected.shape[1] == count(k) and (k != 16 or count(k) == 153)
    assert error(packed(jnp.asarray(x)), expected) < 1e-6
    y = x[::-1].astype(np.float64)
    s = np.sum(x * y, axis=1) / k**0.5
    assert error(np.sum(expected * expected[::-1], axis=1), 1 + s + s**2 / 2) < 1e-12


def test_selections_are_padded_by_zeros():
    few, many = selections(3, count(3)), selections(3, 16)
    for name in ("left", "right", "weight", "left_one", "right_one"):
        x, y = getattr(few, name), getattr(many, name)
        np.testing.assert_array_equal(y[..., : count(3)], x)
        assert y.shape[-1] == 16 and not y[..., count(3) :].any()


CASES = [
    # t, chunk, state, segments, normalise
    (1, None, False, False, False),  # one normalised value is itself, whatever its score
    (1, 16, True, True, True),
    (63, 64, True, True, True),
    (63, 10, True, False, False),
    (63, 1, False, False, True),
    (63, 7, False, True, False),
    (63, 200, False, True, True),
    (257, 50, True, True, True),
    (257, None, False, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_xla_is_the_sum(case):
    t, chunk, with_state, with_segments, normalise = case
    given, fixed = arguments(t, with_state, with_segments, normalise)
    how = {"scale": 0.3, "normalise": normalise, "return_state": True}
    found = results(functools.partial(taylor_attention, **how, chunk_size=chunk, backend="xla"), given, fixed)
    exact = exactly(functools.partial(taylor_attention, **how, backend="reference"), given, fixed)
    o, state = by_loops(**given, scale=0.3, normalise=normalise, **fixed)
    assert error(exact[0][0], o) < 1e-12 and error(exact[0][1], state) < 1e-12
    assert found[0][0].dtype == jnp.float32
    compare(found, exact, CLOSE)


@pytest.mark.wide
def test_xla_at_a_thousand_tokens():
    given, fixed = arguments(1000, True, True, k=16, v=8)
    found = results(functools.partial(taylor_attention, return_state=True, backend="xla"), given, fixed)
    compare(
        found,
        exactly(functools.partial(taylor_attention, scale=0.25, return_state=True, backend="reference"), given, fixed),
        CLOSE,
    )


@pytest.mark.parametrize(("normalise", "with_segments"), [(True, True), (False, False)])
def test_the_square_form_is_the_sum(normalise, with_segments):
    given, fixed = arguments(63, False, with_segments, normalise)
    how = {"scale": 0.7, "normalise": normalise}
    (o, _), gradients = exactly(lambda **given: (reference.quadratic(**given, **how), None), given, fixed)
    (o_, _), gradients_ = exactly(functools.partial(taylor_attention, **how, backend="reference"), given, fixed)
    assert error(o, o_) < 1e-12
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < 1e-11, name


def test_the_default_scale_and_shared_keys():
    given, _ = arguments(20, True, False, h=4, hk=2)
    o, state = taylor_attention(**given, epsilon=0.5, return_state=True, chunk_size=8)
    expected, expected_state = by_loops(**given, epsilon=0.5)
    assert error(o, expected) < CLOSE and error(state, expected_state) < CLOSE


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_padding_full_of_nan_touches_nothing(backend):
    given, fixed = arguments(63, True, True)
    run = functools.partial(taylor_attention, return_state=True, chunk_size=16, backend=backend)
    padding_is_inert(run, given, fixed)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("with_segments", [False, True])
def test_two_calls_are_one(backend, with_segments):
    run = jax.jit(functools.partial(taylor_attention, return_state=True, chunk_size=16, backend=backend))
    cuts_are_joined(
        run, arguments(63, True, with_segments), (1, 40) if backend == "xla" and with_segments else (40,), CLOSE
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_steps_are_one_call(normalise):
    given, _ = arguments(9, True, False, normalise, h=4)
    how = {"normalise": normalise, "epsilon": 0.1}
    expected, last = taylor_attention(**given, **how, return_state=True)
    step, state = jax.jit(functools.partial(taylor_attention_step, **how)), given["initial_state"]
    for i in range(9):
        o, state = step(state, *(given[name][:, i] for name in "qkv"))
        assert error(o, expected[:, i]) < CLOSE
    assert error(state, last) < CLOSE and state.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"taylor_attention_step: state must be \(2, 4, 21, "):
        inspect.unwrap(taylor_attention_step)(state[:, :2], *(given[name][:, 0] for name in "qkv"), **how)


def test_a_state_of_another_document_is_not_read():
    given, _ = arguments(20, True, False)
    ones = np.ones((2, 20), np.int32)
    without = {name: x for name, x in given.items() if name != "initial_state"}
    run = jax.jit(functools.partial(taylor_attention, return_state=True, chunk_size=8))
    o, state = run(**given, segment_ids=ones, initial_segment=np.array([9, 1], np.int32))
    alone, state_alone = run(**without)
    continued, _ = run(**given)
    assert error(o[0], alone[0]) < CLOSE and error(state[0], state_alone[0]) < CLOSE
    assert error(o[1], continued[1]) < CLOSE and error(o[1], alone[1]) > 0.05


def test_no_state_is_returned_unless_asked():
    given, _ = arguments(5, False, False)
    for backend in ("xla", "reference"):
        assert jax.eval_shape(functools.partial(taylor_attention, backend=backend), **given)[1] is None


def test_half_precision_keeps_its_state_in_fp32():
    """Against the specification of the same rounded inputs; its bounds are those of the kernels."""
    given, fixed = arguments(257, True, True, k=16, v=32)
    given = halved(given)
    (o, state), gradients = results(functools.partial(taylor_attention, return_state=True, backend="xla"), given, fixed)
    (o_, state_), gradients_ = exactly(
        functools.partial(taylor_attention, scale=0.25, return_state=True, backend="reference"), given, fixed
    )
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(o, o_) < 0.005 and error(state, state_) < 0.005
    for name in gradients_:
        assert gradients[name].dtype == given[name].dtype and error(gradients[name], gradients_[name]) < 0.01, name


def test_features_of_a_whole_sequence_never_exist():
    """Between the passes one state a chunk is kept; features of all tokens at once would be four times what is found
    here."""
    t, k, v = 4096, 16, 64
    x, y = (jax.ShapeDtypeStruct((1, t, 1, size), jnp.float32) for size in (k, v))
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(taylor_attention(q, k, v, backend="xla")[0]), (0, 1, 2)))
    memory = gradient.lower(x, x, y).compile().memory_analysis().temp_size_in_bytes
    states = (t // 64) * count(k) * (v + 1) * 4
    assert memory < 2 * states + 8 * t * (2 * k + v) * 4

    def flops(t):
        x = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
        return (
            jax.jit(lambda q, k, v: taylor_attention(q, k, v, chunk_size=64, backend="xla")[0])
            .lower(x, x, x)
            .cost_analysis()["flops"]
        )

    assert flops(4096) < 2.2 * flops(2048)


@functools.cache
def _compiled(chunk: int):
    return jax.jit(functools.partial(taylor_attention, return_state=True, chunk_size=chunk, backend="xla"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_and_states(data):
    """Shapes are few, so that programs are: what varies is where documents and padding fall, and how large scores
    are."""
    t, chunk = data.draw(st.sampled_from([1, 11])), data.draw(st.sampled_from([4, 11]))
    segments, first = any_segments(data, t)
    size = data.draw(st.sampled_from([0.0, 0.1, 8.0]))
    inputs, _ = arguments(t, True, False)
    inputs["q"] = size * inputs["q"]
    fixed = {"segment_ids": segments, "initial_segment": first}
    o, state = _compiled(chunk)(**inputs, **fixed)
    expected, expected_state = by_loops(**inputs, **fixed)
    assert error(o, expected) < CLOSE and error(state, expected_state) < CLOSE


def any_segments(data, t):
    """Two rows of up to three documents with padding anywhere, and what came before each row."""
    rows = []
    for _ in range(2):
        ids = np.sort(data.draw(st.lists(st.integers(1, 3), min_size=t, max_size=t)))
        gaps = data.draw(st.lists(st.booleans(), min_size=t, max_size=t))
        rows.append(np.where(gaps, 0, ids))
    segments = np.array(rows, np.int32)
    first = np.array([data.draw(st.integers(0, max(1, min([*row[row != 0], 3])))) for row in segments], np.int32)
    return segments, first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.zeros((2, 6, 8))}, "q must be"),
        ({"k": np.zeros((2, 6, 3, 7))}, "k must have"),
        ({"v": np.zeros((2, 5, 3, 4))}, "v must be"),
        ({"v": np.zeros((2, 6, 4))}, "v must be"),
        ({"v": np.zeros((2, 6, 4, 4))}, "3 heads, which must divide the 4 of v"),
        ({"initial_state": np.zeros((2, 3, 45, 4))}, r"initial_state must be \(2, 3, 45, 5\)"),
        ({"initial_state": np.zeros((2, 3, 45, 5)), "normalise": False}, r"initial_state must be \(2, 3, 45, 4\)"),
        ({"segment_ids": np.ones((2, 5), np.int32)}, "segment_ids must be"),
        ({"segment_ids": np.ones((2, 6), np.int32), "initial_state": np.zeros((2, 3, 45, 5))}, "initial_segment"),
        ({"epsilon": -1.0}, "epsilon must be at least 0; got -1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"backend": "pallas_tpu"}, "pallas_tpu"),
        ({"backend": "numpy"}, "backend='numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    given = {"q": np.zeros((2, 6, 3, 8)), "k": np.zeros((2, 6, 3, 8)), "v": np.zeros((2, 6, 3, 4)), **changes}
    with pytest.raises(ValueError, match=f"^taylor_attention.*{message}"):
        inspect.unwrap(operation)(**given)
