"""Short and long convolutions: xla = reference = an independent numpy sum, with segments, padding and states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_convolution import long_convolution, short_convolution

TOLERANCE = 2e-6  # fp32 sums of up to a few hundred terms; a Fourier transform of 514 points measures 3e-7


def error(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ragged_segments(seed, b, t):
    """Documents of about 15 tokens, a fifth of the positions padding, wherever."""
    random = np.random.default_rng(seed)
    segments = 1 + np.cumsum(random.random((b, t)) < 1 / 15, axis=1)
    segments[random.random((b, t)) < 0.2] = 0
    return jnp.asarray(segments, jnp.int32)


def by_hand(x, taps, segments=None):
    """float64, one output at a time."""
    x, taps = np.asarray(x, np.float64), np.asarray(taps, np.float64)
    segments = np.ones(x.shape[:2], int) if segments is None else np.asarray(segments)
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
        for segment in set(segments[row]) - {0}:
            places = np.flatnonzero(segments[row] == segment)
            for n, place in enumerate(places):
                lags = range(min(n + 1, len(taps)))
                y[row, place] = sum(taps[lag] * x[row, places[n - lag]] for lag in lags)
    return y


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("t", [1, 37])
def test_values_by_hand(backend, segmented, t):
    x, taps, filter = normal(0, 2, t, 3), normal(1, 4, 3), normal(2, 50, 3)
    segments = ragged_segments(3, 2, t) if segmented and t > 1 else (jnp.array([[5], [0]]) if segmented else None)
    y, state = short_convolution(x, taps, segment_ids=segments, backend=backend)
    assert state is None
    assert error(y, by_hand(x, taps, segments)) < TOLERANCE
    long = jax.jit(lambda x: long_convolution(x, filter, segment_ids=segments, backend=backend))
    assert error(long(x), by_hand(x, filter, segments)) < TOLERANCE


def test_first_tap_is_the_current_token():
    x = jnp.array([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    y, _ = short_convolution(x, jnp.array([[1.0], [2.0]]), jnp.array([1000.0]))
    assert y.ravel().tolist() == [1001.0, 1012.0, 1120.0]


@pytest.mark.parametrize("t", [1, 63, 257])
@pytest.mark.parametrize("segmented", [False, True])
def test_short_xla_equals_reference(t, segmented):
    b, d, k = 2, 3, 4
    segments = ragged_segments(t, b, t) if segmented else None
    cotangent = normal(9, b, t, d)

    def run(backend, x, taps, bias, old):
        y, state = short_convolution(
            x,
            taps,
            bias,
            initial_state=old,
            segment_ids=segments,
            initial_segment=jnp.array([1, 2]) if segmented else None,
            return_state=True,
            backend=backend,
        )
        return jnp.sum(y * cotangent) + jnp.sum(jnp.sin(state)), (y, state)

    arguments = normal(0, b, t, d), normal(1, k, d), normal(2, d), normal(3, b, k - 1, d)
    results = {
        name: jax.jit(jax.value_and_grad(lambda *a, name=name: run(name, *a), argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
        for name in ("xla", "reference")
    }
    for got, wanted in zip(jax.tree.leaves(results["xla"]), jax.tree.leaves(results["reference"]), strict=True):
        assert jnp.allclose(got, 0) if not jnp.any(wanted) else error(got, wanted) < TOLERANCE


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("t", "length"), [(1, "long"), (63, "long"), (64, "short"), (65, "long"), (257, "short")])
def test_long_xla_equals_reference(t, segmented, length):
    b, d = 2, 3
    filter = normal(1, max(1, t // 3) if length == "short" else t + 5, d)
    segments = ragged_segments(t, b, t) if segmented else None
    cotangent = normal(9, b, t, d)

    def run(backend, x, filter):
        y = long_convolution(x, filter, segment_ids=segments, backend=backend)
        return jnp.sum(y * cotangent), y

    results = {
        name: jax.jit(jax.value_and_grad(lambda *a, name=name: run(name, *a), argnums=(0, 1), has_aux=True))(normal(0, b, t, d), filter)
        for name in ("xla", "reference")
    }
    for got, wanted in zip(jax.tree.leaves(results["xla"][1:]), jax.tree.leaves(results["reference"][1:]), strict=True):
        assert error(got, wanted) < TOLERANCE
    assert abs(results["xla"][0][0] - results["reference"][0][0]) < TOLERANCE * jnp.linalg.norm(cotangent) * jnp.linalg.norm(
        results["xla"][0][1]
    )


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_state_hands_over_across_padding_and_documents(backend, kernel):
    """Chunks of a row with padding sprinkled in, against the row in one go; the state itself against the inputs."""
    b, t, d = 3, 60, 2
    x, taps, segments = normal(0, b, t, d), normal(1, kernel, d), ragged_segments(4, b, t)
    whole = by_hand(x, taps, segments)
    state, segment, out = jnp.zeros((b, kernel - 1, d)), jnp.zeros(b, jnp.int32), []

    @jax.jit
    def run(x, state, segments, segment):
        return short_convolution(
            x, taps, initial_state=state, segment_ids=segments, initial_segment=segment, return_state=True, backend=backend
        )

    for start in range(0, t, 10):
        part = segments[:, start : start + 10]
        y, state = run(jnp.where((part == 0)[..., None], jnp.nan, x[:, start : start + 10]), state, part, segment)
        out.append(y)
        for row in range(b):
            seen = np.asarray(segments)[row, : start + 10]
            places = np.flatnonzero(seen)
            if len(places):
                segment = segment.at[row].set(seen[places[-1]])
                newest = np.flatnonzero(seen == seen[places[-1]])[-(kernel - 1) :] if kernel > 1 else []
                wanted = np.zeros((kernel - 1, d))
                if len(newest):
                    wanted[-len(newest) :] = np.asarray(x[row])[newest]
                np.testing.assert_array_equal(state[row], wanted.astype(np.float32))
    assert error(jnp.concatenate(out, axis=1), whole) < TOLERANCE


def test_padding_is_nowhere():
    """NaN in padding reaches no output and no gradient, and moving padding moves nothing but itself."""
    x, taps, filter, segments = normal(0, 2, 40, 3), normal(1, 3, 3), normal(2, 40, 3), ragged_segments(5, 2, 40)
    poisoned = jnp.where((segments == 0)[..., None], jnp.nan, x)

    def total(x, taps, filter):
        y, _ = short_convolution(x, taps, segment_ids=segments)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(long_convolution(x, filter, segment_ids=segments)))

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    clean, dirty = (run(value, taps, filter) for value in (x, poisoned))
    for got, wanted in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_causal_and_apart_bit_for_bit():
    x, filter = normal(0, 1, 200, 2), normal(1, 200, 2)
    segments = jnp.where(jnp.arange(200) < 90, 1, 2)[None]
    run = jax.jit(lambda x: long_convolution(x, filter, segment_ids=segments))
    later, other = x.at[:, 150:].add(1e3), x.at[:, :90].add(1e3)
    np.testing.assert_array_equal(run(later)[:, :150], run(x)[:, :150])
    np.testing.assert_array_equal(run(other)[:, 90:], run(x)[:, 90:])


def test_bfloat16_sums_in_float32():
    x, taps, filter = normal(0, 2, 100, 4).astype(jnp.bfloat16), normal(1, 4, 4), normal(2, 100, 4)
    for y, wanted in (
        (short_convolution(x, taps)[0], by_hand(x, taps)),
        (long_convolution(x, filter), by_hand(x, filter)),
    ):
        assert y.dtype == jnp.bfloat16
        assert error(y, wanted) < 2.0**-9  # rounding the result once: at most half of 2^-8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": jnp.zeros((2, 4))}),
        ("taps", {"taps": jnp.zeros((3, 6))}),
        ("bias", {"bias": jnp.zeros(4)}),
        ("initial_state", {"initial_state": jnp.zeros((2, 3, 5))}),
        ("segment_ids", {"segment_ids": jnp.ones((2, 3), jnp.int32)}),
        ("initial_segment", {"initial_state": jnp.zeros((2, 2, 5)), "segment_ids": jnp.ones((2, 4), jnp.int32)}),
        ("in_gate", {"in_gate": jnp.zeros((2, 4, 1))}),
        ("out_gate", {"out_gate": jnp.zeros((2, 3, 5))}),
        ("activation", {"activation": "relu"}),
        ("backend", {"backend": "pallas_tpu"}),
    ],
)
def test_wrong_arguments_are_named(name, change):
    arguments = {"x": jnp.zeros((2, 4, 5)), "taps": jnp.zeros((3, 5)), "bias": None} | change
    with pytest.raises(ValueError, match=name if name != "backend" else "pallas_tpu"):
        short_convolution(arguments.pop("x"), arguments.pop("taps"), arguments.pop("bias"), **arguments)


def test_wrong_filter_is_named():
    with pytest.raises(ValueError, match="filter"):
        long_convolution(jnp.zeros((2, 4, 5)), jnp.zeros((4, 6)))
