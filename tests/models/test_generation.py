"""Generation from the decoding state against running the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Landmark, LinearAttention
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.models import memory, repeat
from recollect.models.generation import _sample, generate
from recollect.models.language_model import LanguageModelModule
from tests.models.probes import functional

MODEL, PARAMS = functional(
    width=16,
    stages=repeat(Landmark(block=3, heads=2, positions=Rotary()), LinearAttention(heads=2, feature_dim=3), depth=2),
    positions=LearnedPositions(maximum=24),
    tied=False,  # a tied head says the last token again and again at random weights
)
PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_greedy_is_the_likeliest_token_each_time():
    found = generate(MODEL, PARAMS, PROMPTS, 12, temperature=0.0)
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
    np.testing.assert_array_equal(generate(MODEL, PARAMS, PROMPTS, 12, temperature=0.0, seed=5), found)


def test_sampling():
    def sample(**settings):
        return generate(MODEL, PARAMS, PROMPTS, 12, **settings)

    first = sample(temperature=1.0, seed=1)
    np.testing.assert_array_equal(sample(temperature=1.0, seed=1), first)
    assert np.any(sample(temperature=1.0, seed=2) != first)
    assert first.min() >= 0 and first.max() < 23
    greedy = sample(temperature=0.0)
    np.testing.assert_array_equal(sample(temperature=1.0, top_p=1e-6, seed=1), greedy)
    np.testing.assert_array_equal(sample(temperature=1e-5, seed=1), greedy)


def test_samples_follow_the_probabilities_kept():
    probabilities = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 5))

    def shares(top_p):
        return (
            np.bincount(np.asarray(jax.jit(_sample)(jax.random.key(0), logits, jnp.float32(top_p))), minlength=5) / 4000
        )

    np.testing.assert_allclose(shares(1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(
        shares(0.6), np.array([0, 0.4, 0, 0.3, 0]) / 0.7, atol=0.03
    )  # .4 does not reach .6, .4 + .3 does
    np.testing.assert_allclose(shares(0.8), np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=0.03)


@pytest.mark.parametrize(
    ("prompts", "length", "settings", "message"),
    [
        (np.zeros((1, 0)), 3, {}, "at least one token"),
        (np.zeros(3), 3, {}, "at least one token"),
        (PROMPTS, 0, {}, "length=0"),
        (PROMPTS, 3, {"temperature": -0.5}, r"temperature=-0\.5"),
        (PROMPTS, 3, {"top_p": 0.0}, r"top_p=0\.0"),
        (PROMPTS, 3, {"top_p": 1.5}, r"top_p=1\.5"),
        (PROMPTS, 20, {}, "prompt of 5 tokens and 20 more are 25 tokens; this model takes at most 24"),
    ],
)
def test_mistakes(prompts, length, settings, message):
    with pytest.raises(UserError, match=message):
        generate(MODEL, PARAMS, prompts, length, **settings)


def test_a_state_that_is_too_short_is_noticed(monkeypatch):
    """No text from a state that dropped tokens, whoever made it."""
    make = LanguageModelModule.init_state
    monkeypatch.setattr(LanguageModelModule, "init_state", lambda self, batch, length: make(self, batch, length - 2))
    with pytest.raises(UserError, match="prompt of 5 tokens and 7 more do not fit into the decoding state"):
        generate(MODEL, PARAMS, PROMPTS, 7, temperature=0.0)


def test_the_last_position_can_be_used():
    assert generate(MODEL, PARAMS, PROMPTS, 19, temperature=0.0).shape == (2, 19)


def test_a_length_without_memory_is_refused_before_anything_is_made(monkeypatch):
    with pytest.raises(UserError, match=r"generating 1,000,000,000 tokens would take at least .*, and there are "):
        generate(*functional(width=16, stages=repeat(Landmark(block=3, heads=2), depth=2)), PROMPTS, 10**9)
    recurrent = functional(width=16, stages=repeat(LinearAttention(heads=2, feature_dim=3), depth=2))
    with pytest.raises(UserError, match=r"length=3,000,000,000: prompt and continuation must be less than"):
        generate(*recurrent, PROMPTS, 3 * 10**9)
    monkeypatch.setattr(memory, "device_memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"would take at least 48 GB of memory, and there are 1\.07 GB here"):
        generate(*recurrent, PROMPTS, 10**9)
