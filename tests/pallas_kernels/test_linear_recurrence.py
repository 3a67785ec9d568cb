"""The recurrence: its xla form against the specification in fp64, and the specification against loops in numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.pallas_kernels.linear_recurrence import linear_recurrence, reference

CLOSE = 1e-5  # fp32 sums of up to 257 products, against fp64
NAMES = ("q", "k", "v", "log_decay", "initial_state")


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found), initial=0))


def by_loops(q, k, v, *, log_decay=None, scale=1.0, initial_state=None, segment_ids=None, initial_segment=None):
    """Outputs and last state in numpy float64, a token and a head at a time, straight from the equation."""
    b, t, h, key_dim = q.shape
    o, states = np.zeros(v.shape), np.zeros((b, h, key_dim, v.shape[3]))
    for row in range(b):
        for head in range(h):
            s = (
                np.zeros((key_dim, v.shape[3]))
                if initial_state is None
                else np.asarray(initial_state[row, head], np.float64)
            )
            current = 0 if initial_segment is None else int(initial_segment[row])
            for i in range(t):
                segment = 1 if segment_ids is None else int(segment_ids[row, i])
                if segment_ids is not None and segment == 0:
                    continue
                if segment_ids is not None and segment != current:
                    s = np.zeros_like(s)
                current = segment
                if log_decay is not None:
                    s = s * np.exp(np.float64(log_decay[head] if log_decay.ndim == 1 else log_decay[row, i, head]))
                s = s + np.outer(np.asarray(k[row, i, head], np.float64), np.asarray(v[row, i, head], np.float64))
                o[row, i, head] = s.T @ (scale * np.asarray(q[row, i, head], np.float64))
            states[row, head] = s
    return o, states


def documents(b: int, t: int) -> np.ndarray:
    """Rows of documents of uneven length, with padding at the start, inside documents, between them and at the end."""
    rng = np.random.default_rng(t)
    rows = 3 + np.sort(rng.integers(0, 4, (b, t)), axis=1)
    if t > 8:
        rows[rng.random((b, t)) < 0.15] = 0
        rows[0, :3] = 0
        rows[-1, -5:] = 0
    return rows.astype(np.int32)


def arguments(t, decay, with_state, with_segments, b=2, h=2, k=5, v=4):
    """Random numpy inputs; `decay` is None, a number for all tokens and heads, "head" or "token"."""
    rng = np.random.default_rng(t)
    given: dict = {
        name: rng.normal(size=(b, t, h, size)).astype(np.float32) for name, size in (("q", k), ("k", k), ("v", v))
    }
    if decay == "head":
        given["log_decay"] = np.array([0.0, -0.5], np.float32)
    elif decay == "token":
        given["log_decay"] = -rng.exponential(0.3, (b, t, h)).astype(np.float32)
    elif decay is not None:
        given["log_decay"] = np.full((b, t, h), decay, np.float32)
    if with_state:
        given["initial_state"] = rng.normal(size=(b, h, k, v)).astype(np.float32)
    fixed: dict = {}
    if with_segments:
        fixed["segment_ids"] = documents(b, t)
        if with_state:
            first = [row[row != 0][0] for row in fixed["segment_ids"]]
            fixed["initial_segment"] = np.array(
                [first[0], *[2] * (b - 1)], np.int32
            )  # row 0 continues its document, others start one
    return given, fixed


def results(form, given, fixed, with_state_loss=True):
    """Outputs, state and the gradients by all float inputs of a sum that weighs every output and state element
    differently."""

    def loss(given):
        o, state = form(**given, **fixed)
        wide = jnp.promote_types(o.dtype, jnp.float32)
        total = jnp.sum(o.astype(wide) * jnp.cos(jnp.arange(o.size, dtype=wide)).reshape(o.shape))
        if state is not None and with_state_loss:
            total = total + jnp.sum(state * jnp.sin(1 + jnp.arange(state.size, dtype=state.dtype)).reshape(state.shape))
        return total, (o, state)

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(given)
    return outputs, gradients


def exactly(form, given, fixed):
    """`results` of a specification in fp64."""
    with jax.enable_x64(True):
        outputs, gradients = results(form, {name: jnp.asarray(x, jnp.float64) for name, x in given.items()}, fixed)
        return jax.tree.map(np.asarray, (outputs, gradients))


CASES = [
    # t, chunk, decay, state, segments
    (1, 64, None, False, False),
    (1, 16, "token", True, True),
    (63, 64, "head", True, True),
    (63, 10, "token", True, True),
    (63, 16, -8.0, True, True),
    (63, 1, -8.0, False, False),
    (63, 7, -1e-4, False, True),
    (63, 200, None, True, True),
    (257, 50, "token", True, True),
    (257, 64, None, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_xla_is_the_recurrence(case):
    t, chunk, *kind = case
    given, fixed = arguments(t, *kind)
    (o, state), gradients = results(
        functools.partial(linear_recurrence, scale=0.7, return_state=True, chunk_size=chunk, backend="xla"),
        given,
        fixed,
    )
    (o_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=0.7, return_state=True, backend="reference"), given, fixed
    )
    expected, expected_state = by_loops(**given, scale=0.7, **fixed)
    assert error(o_, expected) < 1e-12 and error(state_, expected_state) < 1e-12
    assert o.dtype == jnp.float32 and state.dtype == jnp.float32
    assert error(o, o_) < CLOSE and error(state, state_) < CLOSE
    assert set(gradients) == set(gradients_) == set(given)
    for name in gradients_:
        # What reaches a strong decay's gradient is e^-8 of the sums it is a difference of.
        close = 10 * CLOSE if name == "log_decay" and kind[0] == -8.0 else CLOSE
        assert error(gradients[name], gradients_[name]) < close, name


@pytest.mark.parametrize(("decay", "with_segments"), [(None, True), ("token", True), (-8.0, False)])
def test_the_square_form_is_the_recurrence(decay, with_segments):
    given, fixed = arguments(63, decay, False, with_segments)
    (o, _), gradients = exactly(lambda **given: (reference.quadratic(**given, scale=0.7), None), given, fixed)
    (o_, _), gradients_ = exactly(functools.partial(linear_recurrence, scale=0.7, backend="reference"), given, fixed)
    assert error(o, o_) < 1e-12
    for name in gradients_:
        assert error(gradients[name], gradients_[name]) < 1e-11, name


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_padding_full_of_nan_touches_nothing(backend):
    given, fixed = arguments(63, "token", True, True)
    real = fixed["segment_ids"] != 0
    form = functools.partial(linear_recurrence, return_state=True, chunk_size=16, backend=backend)

    def filled(value):
        return {
            name: x if name == "initial_state" else np.where(real.reshape(2, 63, *(1,) * (x.ndim - 2)), x, value)
            for name, x in given.items()
        }

    clean, dirty = (results(form, filled(np.float32(value)), fixed) for value in (0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.all(np.isfinite(dirty[0][1]))
    assert np.all(np.asarray(dirty[0][0])[~real] == 0)
    for name in ("q", "k", "v", "log_decay"):
        assert np.all(np.asarray(dirty[1][name])[~real] == 0), name


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("with_segments", [False, True])
def test_two_calls_are_one(backend, with_segments):
    given, fixed = arguments(63, "token", True, with_segments)
    segments = fixed.get("segment_ids")
    form = jax.jit(functools.partial(linear_recurrence, return_state=True, chunk_size=16, backend=backend))
    whole, last = form(**given, **fixed)
    for cut in (1, 40) if backend == "xla" and with_segments else (40,):  # inside documents
        parts, state, first = [], given["initial_state"], fixed.get("initial_segment")
        for span in (slice(0, cut), slice(cut, 63)):
            part = {name: x[:, span] for name, x in given.items() if name != "initial_state"}
            more = {} if segments is None else {"segment_ids": segments[:, span], "initial_segment": first}
            o, state = form(**part, initial_state=state, **more)
            parts.append(o)
            if segments is not None:
                first = np.array(
                    [([start] + [s for s in row[span] if s])[-1] for start, row in zip(first, segments, strict=True)],
                    np.int32,
                )
        assert error(np.concatenate(parts, axis=1), whole) < CLOSE and error(state, last) < CLOSE


def test_a_state_of_another_document_is_not_read():
    given, _ = arguments(20, "head", True, False)
    ones = np.ones((2, 20), np.int32)
    without = {name: x for name, x in given.items() if name != "initial_state"}
    form = jax.jit(functools.partial(linear_recurrence, return_state=True, chunk_size=8))
    o, state = form(**given, segment_ids=ones, initial_segment=np.array([9, 1], np.int32))
    alone, state_alone = form(**without)
    continued, _ = form(**given)
    assert error(o[0], alone[0]) < CLOSE and error(state[0], state_alone[0]) < CLOSE
    assert error(o[1], continued[1]) < CLOSE and error(o[1], alone[1]) > 0.1


def test_no_state_is_returned_unless_asked():
    given, _ = arguments(5, None, False, False)
    for backend in ("xla", "reference"):
        assert jax.eval_shape(functools.partial(linear_recurrence, backend=backend), **given)[1] is None


def test_half_precision_keeps_its_state_in_fp32():
    given, fixed = arguments(257, "head", False, True)
    expected, expected_state = by_loops(**given, **fixed)
    low = {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, x in given.items()}
    o, state = jax.jit(functools.partial(linear_recurrence, return_state=True))(**low, segment_ids=fixed["segment_ids"])
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(o, expected) < 0.01 and error(state, expected_state) < 0.01  # inputs and weights rounded to 8 bits


def test_memory_grows_with_length_not_its_square():
    """A work count stands for it: the chunked form's grows by the length."""

    def flops(t):
        x = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
        return (
            jax.jit(lambda q, k, v: linear_recurrence(q, k, v, chunk_size=64)[0])
            .lower(x, x, x)
            .cost_analysis()["flops"]
        )

    assert flops(4096) < 2.2 * flops(2048)


@functools.cache
def _compiled(chunk: int):
    return jax.jit(functools.partial(linear_recurrence, return_state=True, chunk_size=chunk, backend="xla"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_states_and_decays(data):
    """Shapes are few, so that programs are: what varies is where documents, padding and decays fall."""
    t = data.draw(st.sampled_from([1, 11]))
    chunk = data.draw(st.sampled_from([4, 11]))
    rows = []
    for _ in range(2):
        ids = np.sort(data.draw(st.lists(st.integers(1, 3), min_size=t, max_size=t)))
        gaps = data.draw(st.lists(st.booleans(), min_size=t, max_size=t))
        rows.append(np.where(gaps, 0, ids))
    segments = np.array(rows, np.int32)
    first = np.array([data.draw(st.integers(0, max(1, min([*row[row != 0], 3])))) for row in segments], np.int32)
    size = data.draw(st.sampled_from([0.0, 0.1, 8.0, 60.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    q, k, v = (rng.normal(size=(2, t, 2, 3)).astype(np.float32) for _ in range(3))
    given = {
        "log_decay": -size * rng.random((2, t, 2), np.float32),
        "initial_state": rng.normal(size=(2, 2, 3, 3)).astype(np.float32),
    }
    fixed = {"segment_ids": segments, "initial_segment": first}
    o, state = _compiled(chunk)(q, k, v, **given, **fixed)
    expected, expected_state = by_loops(q, k, v, **given, **fixed)
    assert error(o, expected) < CLOSE and error(state, expected_state) < CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": np.zeros((2, 6, 8))}, "q must be"),
        ({"k": np.zeros((2, 6, 3, 7))}, "k must have q's shape"),
        ({"q": np.zeros((2, 6, 2, 8)), "k": np.zeros((2, 6, 2, 8))}, "2 heads, which must divide the 3 of v"),
        ({"v": np.zeros((2, 5, 3, 4))}, "v must be"),
        ({"v": np.zeros((2, 6, 4))}, "v must be"),
        ({"log_decay": np.zeros((6, 3))}, "log_decay must be"),
        ({"log_decay": np.zeros(2)}, "log_decay must be"),
        ({"log_decay": np.zeros((2, 6, 3, 4))}, "log_decay must be"),
        ({"write_strength": np.zeros((2, 6))}, "write_strength must be"),
        ({"erase_read": np.zeros((2, 6, 3))}, "erase_read must be"),
        ({"erase_read": np.zeros((2, 6, 3, 8)), "erase_write": np.zeros((2, 6, 3, 4))}, "erase_write must be"),
        ({"erase_write": np.zeros((2, 6, 3, 8))}, "erase_write without erase_read"),
        ({"value_log_decay": np.zeros((2, 6, 3, 8))}, "value_log_decay must be"),
        ({"value_log_decay": np.zeros((2, 6, 3))}, "value_log_decay must be"),
        ({"erase_before_decay": True}, "erase_before_decay without erase_read"),
        ({"initial_segment": np.zeros(3)}, "initial_segment must be"),
        ({"initial_state": np.zeros((2, 3, 4, 8))}, "initial_state must be"),
        ({"segment_ids": np.ones((2, 5), np.int32)}, "segment_ids must be"),
        ({"segment_ids": np.ones((2, 6), np.int32), "initial_state": np.zeros((2, 3, 8, 4))}, "initial_segment"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"backend": "pallas_tpu"}, "pallas_tpu"),
        ({"backend": "numpy"}, "backend='numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    given = {"q": np.zeros((2, 6, 3, 8)), "k": np.zeros((2, 6, 3, 8)), "v": np.zeros((2, 6, 3, 4)), **changes}
    with pytest.raises(ValueError, match=f"^linear_recurrence.*{message}"):
        linear_recurrence(given.pop("q"), given.pop("k"), given.pop("v"), **given)
