"""linear_recurrence on its kernels, simulated: values and all gradients against the specification in float64.

bf16 is also held against xla in bf16, except where that computes in fp32 what tensor cores of a GPU take in
bf16: what is written to the state (hence the last state) and the decay's gradient have bars alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.pallas_kernels.dispatch import interpreted
from recollect.pallas_kernels.linear_recurrence import gpu_spans, tunables
from recollect.pallas_kernels.tuning import forced
from tests.pallas_kernels.test_linear_recurrence import error, exactly, linear_recurrence, results
from tests.pallas_kernels.test_linear_recurrence_family import arguments

FP32 = 1e-4
FORWARD, GRADIENT, GATE = 0.005, 0.01, 0.02
WIDE_INPUTS = ("log_decay", "value_log_decay", "initial_state", "write_strength")
SCALE = 0.2


def on_kernels(backend, given, fixed, how="values", scale=SCALE):
    with interpreted(how):
        return results(
            functools.partial(linear_recurrence, scale=scale, return_state=True, backend=backend), given, fixed
        )


def rounded(given):
    """What tensor cores multiply in bf16, and the same numbers for the specification."""
    given = {name: jnp.asarray(x, jnp.float32 if name in WIDE_INPUTS else jnp.bfloat16) for name, x in given.items()}
    return given, {name: np.asarray(x, np.float32) for name, x in given.items()}


def check_fp32(backend, given, fixed):
    (o, state), gradients = on_kernels(backend, given, fixed)
    (o_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=SCALE, return_state=True, backend="reference"), given, fixed
    )
    assert error(o, o_) < FP32 and error(state, state_) < FP32
    assert set(gradients) == set(given)
    for name in given:
        assert error(gradients[name], gradients_[name]) < FP32, name


def check_bf16(backend, given, fixed, how="values"):
    given, exact = rounded(given)
    (o_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=SCALE, return_state=True, backend="reference"), exact, fixed
    )
    (o, state), gradients = on_kernels(backend, given, fixed, how)
    (o_xla, _), xla = results(
        functools.partial(linear_recurrence, scale=SCALE, return_state=True, backend="xla"), given, fixed
    )
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(o, o_) < min(FORWARD, 2 * error(o_xla, o_)) and error(state, state_) < FORWARD
    for name in given:
        assert gradients[name].dtype == given[name].dtype
        bar = GATE if name in ("log_decay", "value_log_decay", "write_strength", "erase_read") else GRADIENT
        if backend == "pallas_tpu" or name not in ("log_decay", "value_log_decay", "initial_state"):
            bar = min(bar, 2 * error(xla[name], gradients_[name]))
        assert error(gradients[name], gradients_[name]) < bar, name


def strong(t, **sizes):
    """Decays per token from none at all to nothing left, 8 and 30 in log terms."""
    given, fixed = arguments(t, "token", None, True, False, **sizes)
    kind = np.random.default_rng(t).random(given["log_decay"].shape)
    given["log_decay"] = np.select([kind < 0.25, kind < 0.5, kind < 0.75], [-8.0, -30.0, -1e-4], 0.0).astype(np.float32)
    return given, fixed


TPU = [
    # t, decay, erase, state, segments, key and value size; columns' decay, whether the erase reads the undecayed state
    (1, "token", None, True, True, 40, 24),
    (63, None, None, False, False, 33, 64),
    (257, "token", None, True, True, 64, 48),
    (63, "channel", None, True, True, 32, 40),
    (130, "token", "scalar", True, True, 32, 32),
    (130, "strong", "scalar", True, True, 32, 32, None, True),
    (40, "channel", "apart", True, True, 32, 32, None, True),
    (130, None, None, True, True, 32, 40, "channel"),
]
TPU_WIDE = [
    (1000, None, None, True, True, 64, 64),
    (1000, "token", None, True, True, 96, 160),
    (257, "mixed", None, False, False, 32, 32),
    (1000, "channel", None, True, True, 128, 64),
    (257, None, "scalar", False, False, 64, 64),
    (1000, "token", "scalar", True, True, 64, 64),
    (257, "channel", "vector", True, True, 64, 96),
    (63, "token", None, True, True, 256, 256),
    (257, "mixed", "apart", True, True, 32, 32, None, True),
    (257, "mixed", "vector", True, True, 64, 64, None, True),
    (300, "token", "apart", False, True, 64, 64),
    (1000, None, None, True, True, 64, 128, "channel"),
    (257, "token", None, False, True, 64, 64, "mixed"),
]


def case_arguments(case):
    t, decay, erase, state, segments, k, v, *more = case
    return arguments(t, decay, erase, state, segments, *more, k=k, v=v)


@pytest.mark.parametrize(
    "case",
    [*TPU, *(pytest.param(case, marks=pytest.mark.wide) for case in TPU_WIDE)],
    ids=lambda case: " ".join(map(str, case)),
)
def test_tpu_kernels_are_the_recurrence(case):
    given, fixed = case_arguments(case)
    # Kernels stop at e^-10 per token and channel, 4.5e-5, which is what 1e-4 allows.
    for name, kind in (("log_decay", case[1]), ("value_log_decay", case[7] if len(case) > 7 else None)):
        if kind == "mixed":
            given[name] = np.maximum(given[name], -10)
    check_fp32("pallas_tpu", given, fixed)


def test_tpu_kernels_under_strong_decays():
    given, fixed = strong(130, k=32, v=32)
    (o, state), gradients = on_kernels("pallas_tpu", given, fixed)
    (o_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=SCALE, return_state=True, backend="reference"), given, fixed
    )
    assert error(o, o_) < FP32 and error(state, state_) < FP32
    for name in given:
        assert error(gradients[name], gradients_[name]) < FP32, name


@pytest.mark.parametrize(
    "case",
    [
        (257, "token", None, True, True, 64, 64),
        pytest.param((300, "channel", None, True, True, 64, 64), marks=pytest.mark.wide),
        pytest.param((1000, "token", "scalar", True, True, 64, 64), marks=pytest.mark.wide),
    ],
    ids=lambda case: " ".join(map(str, case)),
)
def test_tpu_kernels_in_bf16(case):
    check_bf16("pallas_tpu", *case_arguments(case))


@pytest.mark.parametrize(
    "backend", ["xla", "pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.gpu_interpreter)]
)
@pytest.mark.parametrize(
    "case",
    [
        (70, "token", None, True, False, 64, 64),
        (70, "token", "scalar", True, False, 64, 64),
        (70, None, None, True, False, 64, 64, "channel"),
    ],
    ids=lambda case: " ".join(map(str, case)),
)
def test_at_scale_0_the_state_alone_has_gradients(backend, case):
    given, fixed = case_arguments(case)
    exact, bar, decay_bar = given, FP32, FP32
    if backend == "pallas_gpu":
        # A decay's gradient is <S, dS> at the end of a group less sums of products rounded separately. Of a last state
        # alone, in which little of early tokens is left, nearly all of it cancels at those tokens, and what rounding
        # leaves is held against the last few.
        (given, exact), bar, decay_bar = rounded(given), GATE, 0.05
    (o, state), gradients = on_kernels(backend, given, fixed, scale=0.0)
    (_, state_), gradients_ = exactly(
        functools.partial(linear_recurrence, scale=0.0, return_state=True, backend="reference"), exact, fixed
    )
    assert not np.any(np.asarray(o)) and not np.any(np.asarray(gradients["q"]))
    assert error(state, state_) < bar
    assert set(gradients) == set(given)
    for name in given.keys() - {"q"}:
        assert np.any(gradients_[name])
        assert error(gradients[name], gradients_[name]) < (decay_bar if name.endswith("decay") else bar), name


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    "case",
    [
        (63, None, None, False, False, 64, 64),
        (130, "token", None, True, True, 64, 40),
        (130, "channel", None, True, True, 64, 64),
        (130, "token", "scalar", True, True, 64, 64),
        (130, "token", "scalar", True, True, 64, 64, None, True),
        (130, None, None, True, True, 64, 64, "channel"),
        pytest.param((130, "token", None, True, True, 40, 96, "channel"), marks=pytest.mark.wide),
        pytest.param((130, "channel", "apart", True, True, 64, 64, None, True), marks=pytest.mark.wide),
        pytest.param((130, "mixed", "vector", True, True, 64, 64, None, True), marks=pytest.mark.wide),
        pytest.param((130, "channel", "vector", True, True, 64, 64), marks=pytest.mark.wide),
        pytest.param((130, "channel", None, True, True, 128, 128), marks=pytest.mark.wide),
        pytest.param((130, "channel", "vector", True, True, 128, 128), marks=pytest.mark.wide),
        pytest.param((1000, "token", None, True, True, 128, 128), marks=pytest.mark.wide),
        pytest.param((1000, "channel", None, True, True, 64, 64), marks=pytest.mark.wide),
        pytest.param((1000, "token", "scalar", True, True, 64, 64), marks=pytest.mark.wide),
    ],
    ids=lambda case: " ".join(map(str, case)),
)
def test_gpu_kernels_in_bf16(case):
    t, decay, erase, state, segments, k, v, *more = case
    check_bf16("pallas_gpu", *arguments(t, decay, erase, state, segments, *more, b=1, k=k, v=v), how="races")


def run_twice(case, **changes):
    given, fixed = case_arguments(case)
    given |= changes
    return [on_kernels("pallas_tpu", given, fixed) for _ in range(2)]


def test_the_same_bits_twice():
    first, second = run_twice((63, "token", "scalar", True, True, 32, 32))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("before", [False, True])
def test_padding_full_of_nan_touches_nothing(before):
    given, fixed = case_arguments((63, "channel", "scalar", True, True, 32, 32, None, before))
    padding = fixed["segment_ids"] == 0
    ruined = dict(given)
    for name in ("q", "k", "v", "log_decay", "erase_read", "write_strength"):
        ruined[name] = np.where(
            padding.reshape(*padding.shape, *[1] * (given[name].ndim - 2)), np.nan, given[name]
        ).astype(np.float32)
    clean = np.where(padding[..., None, None], 0, 1)
    (o, state), gradients = on_kernels("pallas_tpu", ruined, fixed)
    (o_, state_), gradients_ = on_kernels("pallas_tpu", given, fixed)
    np.testing.assert_array_equal(np.asarray(o), np.asarray(o_))
    np.testing.assert_array_equal(np.asarray(state), np.asarray(state_))
    assert not np.any(np.asarray(o) * (1 - clean))
    for name in ("q", "k", "v", "log_decay", "erase_read", "initial_state"):
        np.testing.assert_array_equal(np.asarray(gradients[name]), np.asarray(gradients_[name]))


def test_two_calls_are_one():
    given, _ = case_arguments((70, "token", "scalar", True, False, 32, 32))
    run = functools.partial(linear_recurrence, scale=SCALE, return_state=True, backend="pallas_tpu")
    with interpreted():
        o, state = run(**given)
        parts, after = [], given.pop("initial_state")
        for here in (slice(0, 33), slice(33, 70)):
            part, after = run(**{name: x[:, here] for name, x in given.items()}, initial_state=after)
            parts.append(part)
    assert error(jnp.concatenate(parts, axis=1), o) < 1e-6 and error(after, state) < 1e-6


def test_what_kernels_refuse_is_said():
    given, _ = arguments(9, "channel", None, False, False, "channel", k=32, v=32)
    with pytest.raises(ValueError, match=r"pallas_tpu cannot serve this call: it runs on TPUs; this is cpu"):
        linear_recurrence(**given, backend="pallas_tpu")
    with interpreted():
        with pytest.raises(ValueError, match=r"its columns .value_log_decay., not both"):
            linear_recurrence(**given, backend="pallas_tpu")
        with pytest.raises(ValueError, match="do not erase"):
            linear_recurrence(
                **arguments(9, None, "scalar", False, False, "channel", k=32, v=32)[0], backend="pallas_tpu"
            )
        given, _ = arguments(9, None, None, False, False, k=300, v=32)
        with pytest.raises(ValueError, match="head sizes up to 256; these are 300 and 32"):
            linear_recurrence(**given, backend="pallas_tpu")
        with pytest.raises(ValueError, match="chunk_size is 48"):
            linear_recurrence(**arguments(9, None, None, False, False)[0], chunk_size=48, backend="pallas_tpu")


def test_a_table_decides_chunks():
    """What is forced on them is what they run: other chunks round otherwise, and a kernel's chunk is refused no
    more."""
    given, _ = case_arguments((70, "token", None, False, False, 32, 32))
    o = {}
    for chunk in (128, 16):
        with forced(**{"linear_recurrence.tpu_chunk": {"chunk": chunk}}), interpreted():
            o[chunk] = np.asarray(linear_recurrence(**given, backend="pallas_tpu")[0])
    assert not np.array_equal(o[128], o[16])
    assert error(o[16], o[128]) < 1e-6


@pytest.mark.gpu_interpreter
@pytest.mark.parametrize(
    "case",
    [
        (257, "token", None, True, True, 64, 64),
        (257, "token", "scalar", True, True, 64, 64),
        pytest.param((300, None, None, False, False, 64, 64), marks=pytest.mark.wide),
        pytest.param((300, "channel", None, True, True, 64, 64), marks=pytest.mark.wide),
        pytest.param((257, "channel", "vector", True, False, 64, 64), marks=pytest.mark.wide),
    ],
    ids=lambda case: " ".join(map(str, case)),
)
def test_gpu_kernels_run_spans_of_time_at_once(case):
    t, decay, erase, state, segments, k, v = case
    with forced(**{"linear_recurrence.gpu_spans": {"spans": 3}}):  # 5 chunks: 2, 2 and 1
        check_bf16("pallas_gpu", *arguments(t, decay, erase, state, segments, b=1, k=k, v=v), how="races")


def test_what_is_tuned_is_built_and_right():
    for tunable in tunables.TUNABLES:
        for key in tunable.keys:
            assert tunable.heuristic(**key).keys() == next(iter(tunable.candidates(key))).keys()


def test_long_sequences_of_few_heads_fill_a_hopper_gpu():
    assert gpu_spans.spans_to_fill(1, 65536) == 64
    assert gpu_spans.spans_to_fill(32, 65536) == 4
    assert gpu_spans.spans_to_fill(256, 65536) == 1
    assert gpu_spans.spans_to_fill(1, 1000) == 1
