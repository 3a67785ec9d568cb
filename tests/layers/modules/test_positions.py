"""Rotary and learned positions; norms' and MLPs' formulas are checked next door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import check_length
from recollect.layers.modules.positions import LearnedPositions, Rotary

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3, 10)), jnp.float32)
POSITIONS = jnp.asarray(np.random.default_rng(1).integers(0, 500, (2, 7)), jnp.int32)


def turned(x, positions, base=10_000.0):
    """Complex numbers times e^(i angle): x (..., r) has its real parts first."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[..., None, None] * base ** (-np.arange(half) / half)
    z = (np.asarray(x[..., :half], np.float64) + 1j * np.asarray(x[..., half:], np.float64)) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rotary_is_a_complex_product():
    for base in (10_000.0, 50.0):
        np.testing.assert_allclose(
            Rotary(base=base)(X, POSITIONS), turned(X, POSITIONS, base), atol=2e-4
        )  # angles of 500 in fp32
    np.testing.assert_allclose(Rotary()(X, POSITIONS % 4), turned(X, POSITIONS % 4), atol=2e-6)


def test_scores_depend_on_the_difference_only():
    q, k = X[:, :1], X[:, 1:2]

    def score(i, j, scheme):
        return jnp.sum(scheme(q, jnp.full((2, 1), i)) * scheme(k, jnp.full((2, 1), j)), axis=-1)

    for scheme in (Rotary(), Rotary(layout="interleaved"), Rotary(fraction=0.5)):
        np.testing.assert_allclose(score(9, 4, scheme), score(105, 100, scheme), atol=1e-4)
        assert np.abs(score(9, 4, scheme) - score(9, 5, scheme)).max() > 0.01
        assert np.abs(score(9, 4, scheme) - score(4, 9, scheme)).max() > 0.01


def test_position_zero_and_lengths_stay():
    np.testing.assert_array_equal(Rotary()(X, jnp.zeros_like(POSITIONS)), X)
    np.testing.assert_allclose(jnp.linalg.norm(Rotary()(X, POSITIONS), axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5)


def test_layouts_differ_by_the_order_of_dimensions():
    order = np.concatenate([np.arange(0, 10, 2), np.arange(1, 10, 2)])
    interleaved = Rotary(layout="interleaved")(X, POSITIONS)
    np.testing.assert_allclose(interleaved[..., order], Rotary()(X[..., order], POSITIONS), atol=1e-6)
    assert np.abs(interleaved - Rotary()(X, POSITIONS)).max() > 0.1


@pytest.mark.parametrize(
    ("fraction", "dimensions"), [(0.5, 4), (0.4, 4), (0.99, 8), (0.1, 0)]
)  # of 10, rounded down to even
def test_a_fraction_leaves_the_rest(fraction, dimensions):
    for layout in ("half", "interleaved"):
        out = Rotary(fraction=fraction, layout=layout)(X, POSITIONS)
        np.testing.assert_array_equal(out[..., dimensions:], X[..., dimensions:])
        np.testing.assert_allclose(
            out[..., :dimensions], Rotary(layout=layout)(X[..., :dimensions], POSITIONS), atol=1e-6
        )


def test_angles_are_fp32_for_half_precision():
    out = Rotary()(X.astype(jnp.bfloat16), POSITIONS + 10_001)
    assert out.dtype == jnp.bfloat16  # 10,001 is not a bf16 number: turned by 10,016 the error would be of order 1
    np.testing.assert_allclose(out.astype(jnp.float32), turned(X, POSITIONS + 10_001), atol=0.03)


def test_learned_positions():
    table = LearnedPositions(maximum=5).build(4, nnx.Rngs(params=jax.random.key(0)))
    out = table(jnp.array([[0, 4, 2, 5, 1000]]))
    np.testing.assert_array_equal(out[0, :3], table.table[...][jnp.array([0, 4, 2])])
    assert np.isnan(out[0, 3:]).all()
    assert len({tuple(np.asarray(row)) for row in table.table[...]}) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(base=1.0), r"base=1\.0"),
        (lambda: Rotary(fraction=0.0), r"fraction=0\.0"),
        (lambda: Rotary(fraction=1.5), r"fraction=1\.5"),
        (lambda: LearnedPositions(maximum=0), "maximum=0"),
        (lambda: check_length(6, 5, "the table"), "6 tokens is longer than the table of 5"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()
    check_length(5, 5, "the table")
