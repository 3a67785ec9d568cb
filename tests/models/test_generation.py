"""Generation from the decoding state against running the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Landmark, LinearAttention
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.models import generation, memory, repeat
from recollect.models.generation import Generation, generate
from recollect.models.language_model import LanguageModelModule
from recollect.models.sampling import Sampling, choose
from tests.models.probes import functional

MODEL, PARAMS = functional(
    width=16,
    stages=repeat(Landmark(block=3, heads=2, positions=Rotary()), LinearAttention(heads=2, feature_dim=3), depth=2),
    positions=LearnedPositions(maximum=24),
    tied=False,  # a tied head says the last token again and again at random weights
)
GREEDY = Sampling(temperature=0.0)
PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_greedy_is_the_likeliest_token_each_time():
    found = generate(MODEL, PARAMS, PROMPTS, 12, GREEDY)
    assert found.shape == (2, 12) and found.dtype == np.int32
    full = jax.jit(lambda tokens: MODEL.bind(PARAMS)(tokens))
    text = np.concatenate(
        [PROMPTS, np.zeros((2, 12), np.int32)], axis=1
    )  # causal: what stands after a token does not matter
    for i in range(5, 17):
        logits = np.asarray(full(text))[:, i - 1]
        gap = np.sort(logits, axis=-1)
        assert (gap[:, -1] - gap[:, -2]).min() > 1e-4, "a tie would say nothing"
        text[:, i] = logits.argmax(-1)
    np.testing.assert_array_equal(found, text[:, 5:])
    assert len(np.unique(found)) > 2
    np.testing.assert_array_equal(generate(MODEL, PARAMS, PROMPTS, 12, Sampling(temperature=0.0, seed=5)), found)


def test_sampling():
    def sample(**settings):
        return generate(MODEL, PARAMS, PROMPTS, 12, Sampling(**settings))

    first = sample(temperature=1.0, seed=1)
    np.testing.assert_array_equal(sample(temperature=1.0, seed=1), first)
    assert np.any(sample(temperature=1.0, seed=2) != first)
    assert first.min() >= 0 and first.max() < 23
    greedy = sample(temperature=0.0)
    np.testing.assert_array_equal(sample(temperature=1.0, top_p=1e-6, seed=1), greedy)
    np.testing.assert_array_equal(sample(temperature=1e-5, seed=1), greedy)


def shares(**settings):
    """How often each of five tokens is drawn."""
    sampling = Sampling(**settings)
    keys, logits = jax.random.split(jax.random.key(0), 4000), jnp.broadcast_to(jnp.log(PROBABILITIES), (4000, 5))
    draw = jax.jit(lambda keys: choose(keys, logits, sampling.values(5), greedy=False, filtered=sampling.has_filter))
    return np.bincount(np.asarray(draw(keys)), minlength=5) / 4000


KEY = jax.random.split(jax.random.key(0), 1)
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.6}, [0, 1, 0, 1, 0]),  # .4 does not reach .6, .4 + .3 does
        ({"top_p": 0.8}, [0, 1, 0, 1, 1]),
        ({"top_k": 3}, [0, 1, 0, 1, 1]),
        ({"top_k": 99}, [1, 1, 1, 1, 1]),
        ({"min_p": 0.3}, [0, 1, 0, 1, 1]),  # of .4: .12
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1, 0, 1, 0]),  # (.4 + .3) / .85 reaches .8
    ],
)
def test_samples_follow_the_probabilities_kept(settings, kept):
    expected = PROBABILITIES * kept
    np.testing.assert_allclose(shares(**settings), expected / expected.sum(), atol=0.03)


def test_temperature_and_repetition_penalty():
    sharp = PROBABILITIES**2
    np.testing.assert_allclose(shares(temperature=0.5), sharp / sharp.sum(), atol=0.03)
    logits, seen = jnp.array([[2.0, 1.5, -1.0, -1.2]]), jnp.array([[True, False, True, False]])
    penalised = Sampling(temperature=0.0, repetition_penalty=2.0)
    for of, likeliest in ((seen, 1), (jnp.zeros((1, 4), bool), 0), (jnp.array([[True, True, True, False]]), 0)):
        (token,) = choose(KEY, logits, penalised.values(4), greedy=True, filtered=False, seen=of)
        assert int(token) == likeliest
    negative = choose(KEY, logits[:, 2:], penalised.values(2), greedy=True, filtered=False, seen=seen[:, 2:])
    assert int(negative[0]) == 1, "a negative logit becomes more so"


def test_the_penalty_counts_prompt_and_continuation():
    plain, penalised = (
        generate(MODEL, PARAMS, PROMPTS, 12, Sampling(temperature=0.0, repetition_penalty=penalty))
        for penalty in (1.0, 1e6)
    )
    for prompt, row in zip(PROMPTS, penalised, strict=True):
        assert len({*prompt, *row}) == len({*prompt}) + 12, "no token comes again"
    assert len(np.unique(plain)) < 12


def test_a_row_does_not_depend_on_its_batch():
    """Prompts of different lengths, each alone and all together: tokens and their log-probabilities."""
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [9]]
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=7)
    (together,) = Generation(MODEL, PARAMS, prompts, 10, sampling)
    for row in range(2):
        (alone,) = Generation(MODEL, PARAMS, prompts[row : row + 1], 10, sampling)
        np.testing.assert_array_equal(together.tokens[row, :10], alone.tokens[0, :10])
        np.testing.assert_allclose(together.log_probabilities[row], alone.log_probabilities[0], atol=1e-4)
    assert np.any(together.tokens[1] != together.tokens[3]), "equal prompts are drawn for separately"


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    whole = generate(MODEL, PARAMS, [[*PROMPTS[0], *PROMPTS[1]], [9]], 6, GREEDY)
    monkeypatch.setattr(generation, "LONGEST_CHUNK", 4)
    np.testing.assert_array_equal(generate(MODEL, PARAMS, [[*PROMPTS[0], *PROMPTS[1]], [9]], 6, GREEDY), whole)


def test_log_probabilities_are_the_models():
    sampling = Sampling(temperature=0.5, top_k=2, repetition_penalty=1.5, seed=1)
    (piece,) = Generation(MODEL, PARAMS, PROMPTS, 12, sampling)
    text = np.concatenate([PROMPTS, piece.tokens[:, :12]], axis=1)
    expected = jax.nn.log_softmax(jax.jit(MODEL.bind(PARAMS).__call__)(jnp.asarray(text))[:, 4:-1])
    expected = np.take_along_axis(np.asarray(expected), piece.tokens[:, :12, None], axis=-1)[..., 0]
    np.testing.assert_allclose(piece.log_probabilities[:, :12], expected, atol=1e-4)


def test_the_end_token_ends_a_row():
    free = generate(MODEL, PARAMS, PROMPTS, 12, Sampling(seed=1))
    end = int(free[0, 4])
    assert end not in free[0, :4]
    ended = generate(MODEL, PARAMS, PROMPTS, 12, Sampling(seed=1), end=end)
    assert ended[0].tolist() == [*free[0, :5], *[end] * 7]
    cut = free[1].tolist()
    cut = cut[: cut.index(end) + 1] if end in cut else cut
    assert ended[1].tolist() == cut + [end] * (12 - len(cut)), "the other row goes on"


def test_a_stream_in_pieces_is_the_same_in_constant_memory(monkeypatch):
    """A recurrent model's state has one size, and a stopped row leaves the others alone."""
    model, params = functional(width=16, stages=repeat(LinearAttention(heads=2, feature_dim=3), depth=2), tied=False)
    whole = generate(model, params, PROMPTS, 3 * generation.PIECE, GREEDY)
    long, short = (Generation(model, params, PROMPTS, tokens, GREEDY) for tokens in (10**6, 3 * generation.PIECE))
    assert long.state_bytes == short.state_bytes
    pieces = []
    for piece in short:
        pieces.append(piece)
        short.stop(0)
    assert [piece.counts.tolist() for piece in pieces] == [[16, 16], [0, 16], [0, 16]]
    np.testing.assert_array_equal(np.concatenate([piece.tokens[1] for piece in pieces]), whole[1])


@pytest.mark.parametrize(
    ("prompts", "tokens", "settings", "message"),
    [
        (np.zeros((1, 0)), 3, {}, "at least one token"),
        (np.zeros(3), 3, {}, "at least one token"),
        ([[1], []], 3, {}, "at least one token"),
        (PROMPTS, 0, {}, "tokens=0"),
        (PROMPTS, 3, {"temperature": -0.5}, r"temperature=-0\.5"),
        (PROMPTS, 3, {"temperature": float("nan")}, r"temperature=nan"),
        (PROMPTS, 3, {"top_k": 0}, r"top_k=0"),
        (PROMPTS, 3, {"min_p": 1.1}, r"min_p=1\.1"),
        (PROMPTS, 3, {"repetition_penalty": 0.0}, r"repetition_penalty=0\.0"),
        (PROMPTS, 3, {"seed": 2**63}, r"seed=9223372036854775808"),
        (PROMPTS, 3, {"top_p": 0.0}, r"top_p=0\.0"),
        (PROMPTS, 3, {"top_p": 1.5}, r"top_p=1\.5"),
        (PROMPTS, 20, {}, "prompt of 5 tokens and 20 more are 25 tokens; this model takes at most 24"),
    ],
)
def test_mistakes(prompts, tokens, settings, message):
    with pytest.raises(UserError, match=message):
        generate(MODEL, PARAMS, prompts, tokens, Sampling(**settings))


def test_a_state_that_is_too_short_is_noticed(monkeypatch):
    """No text from a state that dropped tokens, whoever made it."""
    make = LanguageModelModule.init_state
    shorter = lambda self, batch, length, source=None: make(self, batch, length - 2, source)  # noqa: E731
    monkeypatch.setattr(LanguageModelModule, "init_state", shorter)
    with pytest.raises(UserError, match="prompt of 5 tokens and 7 more do not fit into the decoding state"):
        generate(MODEL, PARAMS, PROMPTS, 7, GREEDY)


def test_the_last_position_can_be_used():
    assert generate(MODEL, PARAMS, PROMPTS, 19, GREEDY).shape == (2, 19)


def test_a_length_without_memory_is_refused_before_anything_is_made(monkeypatch):
    with pytest.raises(UserError, match=r"generating 1,000,000,000 tokens would take at least .*, and there are "):
        generate(*functional(width=16, stages=repeat(Landmark(block=3, heads=2), depth=2)), PROMPTS, 10**9)
    recurrent = functional(width=16, stages=repeat(LinearAttention(heads=2, feature_dim=3), depth=2))
    with pytest.raises(UserError, match=r"tokens=3,000,000,000: prompt and continuation must be less than"):
        generate(*recurrent, PROMPTS, 3 * 10**9)
    monkeypatch.setattr(memory, "device_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"would take at least 8 GB of memory, and there are 1\.07 GB here"):
        generate(*recurrent, PROMPTS, 10**9)
