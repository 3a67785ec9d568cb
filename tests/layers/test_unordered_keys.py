"""Linear attention to all keys of a document and to a source, against products of all pairs of features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import LinearAttention
from recollect.layers.context import Context, Source
from recollect.layers.mixer import Place
from recollect.layers.modules.feature_maps import Exp
from recollect.layers.modules.positions import Rotary

STREAM = np.array([[1, 1, 1, 2, 2, 0], [6, 6, 6, 6, 6, 6]])
SOURCE = np.array([[1, 2, 2, 0], [6, 6, 0, 0]])
WIDTH = 8


@functools.cache
def built(**fields):
    config = LinearAttention(heads=2, feature_map=Exp(), positions=Rotary(), **fields)
    return config.build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0)))


def rows(segments, seed):
    return jax.random.normal(jax.random.key(seed), (*segments.shape, WIDTH))


def by_pairs(mixer, x, segments, source, source_segments):
    """o_i = sum_j w_ij v_j / (sum_j w_ij + epsilon), w_ij = exp(R q_i) . exp(R k_j), over keys of i's document."""
    heads = lambda y: y.reshape(*y.shape[:2], 2, -1)  # noqa: E731
    index = lambda segments: np.stack([[list(row[:i]).count(s) for i, s in enumerate(row)] for row in segments])  # noqa: E731
    q = jnp.exp(Rotary()(heads(mixer.query(x)), jnp.asarray(index(segments))))
    k = jnp.exp(Rotary()(heads(mixer.key(source)), jnp.asarray(index(source_segments))))
    same = (segments[:, :, None] == source_segments[:, None]) & (segments != 0)[..., None]
    weights = jnp.where(same[:, None], jnp.einsum("bthk,bshk->bhts", q, k), 0)
    o = jnp.einsum("bhts,bshv->bthv", weights, heads(mixer.value(source)))
    o = o / (jnp.moveaxis(jnp.sum(weights, -1), 1, 2)[..., None] + 1e-6)
    return jnp.where((segments != 0)[..., None], mixer.output(o.reshape(x.shape)), 0)


@pytest.mark.parametrize("cross", [False, True])
def test_outputs_are_those_of_all_pairs(cross):
    mixer = built(cross=True) if cross else built(causal=False)
    x, hidden = rows(STREAM, 1), rows(SOURCE, 2)
    source = Source(hidden, Context(segments=jnp.asarray(SOURCE))) if cross else None
    out = mixer(x, Context(segments=jnp.asarray(STREAM), source=source)).hidden
    expected = by_pairs(mixer, x, STREAM, hidden, SOURCE) if cross else by_pairs(mixer, x, STREAM, x, STREAM)
    np.testing.assert_allclose(jnp.where(STREAM[..., None] != 0, out, 0), expected, atol=1e-5)


def test_a_stream_beside_a_source_keeps_one_sum_per_document():
    mixer, x = built(cross=True), rows(STREAM, 1)
    source = Source(rows(SOURCE, 2), Context(segments=jnp.asarray(SOURCE)))
    expected = mixer(x, Context(segments=jnp.asarray(STREAM), source=source)).hidden
    state, outs = mixer.init_cross_state(source), []
    assert state.sums.shape == (2, 2, 2, 4, 5) and state.segments.tolist() == [[1, 2], [6, 0]]
    for piece in (slice(0, 2), slice(2, 6)):
        out, state = mixer.extend(x[:, piece], state, Context(segments=jnp.asarray(STREAM[:, piece])))
        outs.append(out.hidden)
    real = STREAM[..., None] != 0
    np.testing.assert_allclose(jnp.where(real, jnp.concatenate(outs, 1), 0), jnp.where(real, expected, 0), atol=1e-5)
    traced = jax.jit(lambda source: mixer.init_cross_state(source).sums)(source)
    assert traced.shape[1] == 1 and np.isnan(traced[0]).all() and np.isfinite(traced[1]).all()


def test_what_keys_without_an_order_cannot_do_is_refused():
    with pytest.raises(UserError, match='decay="retnet" needs keys in order'):
        LinearAttention(decay="retnet", causal=False)
    with pytest.raises(UserError, match=r"LinearAttention\(cross=True\) reads a source: give the model an encoder"):
        built(cross=True)(rows(STREAM, 1))
    with pytest.raises(UserError, match="reads a source: streams start from its vectors"):
        built(cross=True).init_state(1, 8)
    with pytest.raises(UserError, match="reads later tokens, so it cannot stream or generate"):
        built(causal=False).init_state(1, 8)
