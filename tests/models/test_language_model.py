"""The model as a whole: logits, packing, streams, landmarks, lengths."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Landmark, LinearAttention
from recollect.layers.mixer import Context
from recollect.layers.modules.mlp import SwiGLU
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.layers.state import check_capacity
from recollect.models import FunctionalModel, LanguageModel, Stage, repeat
from tests.models.probes import PlaceProbe, error, functional

LANDMARK = Landmark(block=3, heads=2, key_heads=1, positions=Rotary())
LINEAR = LinearAttention(heads=2, feature_dim=3, chunk=8)
MIXED, PARAMS = functional(
    width=8,
    stages=(Stage(pattern=(LANDMARK,)), Stage(pattern=(LINEAR, chz.replace(LANDMARK, key_heads=2), LINEAR))),
    mlp=SwiGLU(hidden=8),
    positions=LearnedPositions(maximum=40),
)
T = 25
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 23)
SEGMENTS = np.array([[1] * 9 + [2] * 2 + [3] * 10 + [0] * 4, [7] * 14 + [9] * 11], np.int32)

FULL = jax.jit(lambda params, tokens, context: MIXED.bind(params)(tokens, context))


@jax.jit
def extend(params, tokens, state, context):
    module = MIXED.bind(params)
    hidden, state = module.extend(tokens, state, context)
    return module.logits(hidden), state


def start(length=T):
    return MIXED.bind(PARAMS).init_state(2, length)


def test_logits_are_over_the_vocabulary_alone():
    logits = FULL(PARAMS, TOKENS, Context())
    assert logits.shape == (2, T, 23) and logits.dtype == jnp.float32  # landmarks: no columns and no places
    moved = FULL({**PARAMS, "landmark": -PARAMS["landmark"]}, TOKENS, Context())
    np.testing.assert_array_equal(moved[:, :3], logits[:, :3])  # before the first landmark is filled in
    assert np.all(np.abs(moved - logits)[:, 4:].max(axis=-1) > 1e-4)  # and read after it
    assert "landmark" not in functional(width=8, stages=repeat(LINEAR, depth=1))[1]


def test_the_model_is_causal():
    base = FULL(PARAMS, TOKENS, Context())
    for place in (0, 2, 3, 24):  # the end of a block and its start, too
        changed = FULL(PARAMS, TOKENS.at[:, place].add(1) % 23, Context())
        np.testing.assert_array_equal(changed[:, :place], base[:, :place])
        assert np.abs(changed - base)[:, place:].max() > 1e-4


def test_a_stream_is_the_whole():
    expected = FULL(PARAMS, TOKENS, Context())
    state, found = start(), []
    for i in range(T):
        logits, state = extend(PARAMS, TOKENS[:, i : i + 1], state, Context())
        found.append(logits)
    assert error(jnp.concatenate(found, axis=1), expected) < 1e-5
    state, found = start(), []
    for i in range(0, T, 5):
        logits, state = extend(PARAMS, TOKENS[:, i : i + 5], state, Context())
        found.append(logits)
    assert error(jnp.concatenate(found, axis=1), expected) < 1e-5


def test_ragged_streams_of_documents_are_the_whole():
    expected = np.asarray(FULL(PARAMS, TOKENS, Context(segments=jnp.asarray(SEGMENTS))))
    rng, size = np.random.default_rng(0), 6
    state, done, real = start(), [0, 0], [21, 25]
    found = np.zeros_like(expected)
    while done != real:
        tokens, segments, places = np.zeros((2, size), np.int32), np.zeros((2, size), np.int32), []
        for row in range(2):
            count = min(int(rng.integers(0, size + 1)), real[row] - done[row])
            slots, source = np.sort(rng.choice(size, count, replace=False)), np.arange(done[row], done[row] + count)
            tokens[row, slots], segments[row, slots] = np.asarray(TOKENS)[row, source], SEGMENTS[row, source]
            places.append((slots, source))
            done[row] += count
        logits, state = extend(PARAMS, jnp.asarray(tokens), state, Context(segments=jnp.asarray(segments)))
        for row, (slots, source) in enumerate(places):
            found[row, source] = np.asarray(logits)[row, slots]
    real_places = SEGMENTS != 0
    assert error(found[real_places], expected[real_places]) < 1e-5


def test_documents_packed_are_documents_alone():
    packed = np.asarray(FULL(PARAMS, TOKENS, Context(segments=jnp.asarray(SEGMENTS))))
    for row in range(2):
        for segment in sorted(set(SEGMENTS[row]) - {0}):
            indices = np.flatnonzero(SEGMENTS[row] == segment)
            tokens = jnp.zeros_like(TOKENS).at[0, : len(indices)].set(TOKENS[row, indices])
            alone = FULL(PARAMS, tokens, Context())  # what follows in the row does not matter
            assert error(packed[row, indices], alone[0, : len(indices)]) < 1e-5
    # What padding holds does not matter either.
    other = FULL(PARAMS, jnp.where(SEGMENTS != 0, TOKENS, 22 - TOKENS), Context(segments=jnp.asarray(SEGMENTS)))
    np.testing.assert_array_equal(np.asarray(other)[SEGMENTS != 0], packed[SEGMENTS != 0])


@pytest.mark.parametrize("block", range(1, 8))
def test_the_longest_input_with_landmarks(block):
    for limit in range(1, 40):
        config = LanguageModel(width=4, stages=repeat(Landmark(block=block), PlaceProbe(limit=limit), depth=2))
        assert config.maximum_length() == max(n for n in range(limit + 1) if n + n // block <= limit)


def test_the_longest_input():
    probes = (PlaceProbe(limit=9), PlaceProbe(), PlaceProbe(limit=6))
    assert LanguageModel(stages=repeat(*probes, depth=3)).maximum_length() == 6
    assert LanguageModel(stages=repeat(*probes, depth=3), positions=LearnedPositions(maximum=5)).maximum_length() == 5
    assert LanguageModel(stages=repeat(PlaceProbe(), depth=1)).maximum_length() is None
    model = MIXED.bind(PARAMS)
    with pytest.raises(UserError, match="41 tokens is longer than this model's maximum length of 40"):
        model(jnp.zeros((1, 41), jnp.int32))
    with pytest.raises(UserError, match="maximum length of 40"):
        model.init_state(1, 41)


def test_a_stream_past_its_length():
    """Refused before a layer runs, with landmarks counted; inside jit a flag goes up, for the next call outside."""
    model = MIXED.bind(PARAMS)
    _, state = extend(PARAMS, TOKENS[:, :5], start(5), Context())  # and one landmark, as the sixth token has
    with pytest.raises(UserError, match="room for 6 tokens, landmarks counted; it holds 6, and 2 more"):
        model.extend(TOKENS[:, 5:6], state)
    check_capacity(state)
    _, state = extend(PARAMS, TOKENS[:, :5], state, Context())
    with pytest.raises(UserError, match="gave this state 13 tokens, landmarks counted; it has room for 6 "):
        model.extend(TOKENS[:, :1], state)
    with pytest.raises(UserError, match="gave this state 13 tokens; it has room for 6 "):
        check_capacity(state)


def test_a_stream_past_the_position_table():
    model, params = functional(width=8, stages=repeat(LINEAR, depth=1), positions=LearnedPositions(maximum=4))
    module = model.bind(params)
    state = jax.jit(lambda tokens: module.extend(tokens, module.init_state(2, 4))[1])(TOKENS[:, :4])
    with pytest.raises(UserError, match=r"document of this stream has 5 tokens so far; the model has positions for 4"):
        module.extend(TOKENS[:, :1], state)


def test_landmark_mixers_share_a_block():
    with pytest.raises(UserError, match="same block"):
        LanguageModel(stages=repeat(Landmark(block=3), Landmark(block=4), depth=2))
    assert MIXED.config.landmark_block == 3


@pytest.mark.parametrize("tied", [False, True])
def test_the_head(tied):
    model, params = functional(width=8, stages=repeat(LINEAR, depth=1), tied=tied)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8))
    kernel = params["embedding"].T if tied else params["head"]["kernel"]
    np.testing.assert_allclose(model.bind(params).logits(hidden), hidden @ kernel, rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    model, params = functional(width=64, stages=repeat(PlaceProbe(), depth=1), embedding_dropout=0.25)
    module, tokens = model.bind(params), jnp.arange(23)[None]
    plain = module._embed(tokens, Context())
    np.testing.assert_array_equal(plain[0], params["embedding"])
    dropped = module._embed(tokens, Context(key=jax.random.key(0)))
    zero = np.asarray(dropped == 0)
    assert zero.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(np.asarray(dropped)[~zero], (np.asarray(plain) / 0.75)[~zero], rtol=1e-6)
    assert np.any(np.asarray(module._embed(tokens, Context(key=jax.random.key(1))) == 0) != zero)


def test_bf16_activations_and_fp32_logits():
    config = chz.replace(MIXED.config, dtype="bfloat16")
    low = FunctionalModel(config, 23)
    logits = jax.jit(lambda params: low.bind(params)(TOKENS))(PARAMS)
    assert logits.dtype == jnp.float32
    assert 1e-4 < error(logits, FULL(PARAMS, TOKENS, Context())) < 0.1  # four layers of 8-bit products
    state = jax.eval_shape(lambda: low.bind(PARAMS).init_state(1, 9))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.layers[0].keys)} == {jnp.dtype("bfloat16")}
    assert state.layers[1].parts["memory"].dtype == jnp.float32
