"""InfiniRetri keeps the sentences that a plain loop over windows keeps, and reads a context that fits as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Attention, BaseConvolution, Landmark
from recollect.layers.mixer import Context
from recollect.layers.modules import Rotary
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.infini_retri import InfiniRetri, retrieve_sentences

VOCABULARY, LENGTH, QUESTION = 16, 40, 3
READING = InfiniRetri(window=11, top=3, phrase=4, budget=9)
MIXERS = (BaseConvolution(kernel=3), Attention(heads=4, key_heads=2, positions=Rotary()))
MODEL = FunctionalModel(LanguageModel(width=16, stages=repeat(*MIXERS, depth=2)), VOCABULARY)
PARAMS = jax.tree.map(lambda leaf: 8 * leaf, MODEL.init(jax.random.key(0)))


def rows():
    """Two contexts with sentences of 2 to 5 tokens, and their questions."""
    random = np.random.default_rng(3)
    tokens = random.integers(VOCABULARY, size=(2, LENGTH + QUESTION)).astype(np.int32)
    sentences = np.stack([np.repeat(np.arange(LENGTH), random.integers(2, 6, LENGTH))[:LENGTH] for _ in range(2)])
    return tuple(map(jnp.asarray, (tokens[:, :LENGTH], sentences.astype(np.int32), tokens[:, LENGTH:])))


@jax.jit
def attention(tokens):
    """Softmax weights of the last layer, summed over heads, (t, t)."""
    module = MODEL.bind(PARAMS)
    first, last = module.stack.layers()
    x = first(module.embedding[...][tokens[None]], Context()).hidden
    q, k, _ = last.mixer._project(last.mixer_norm(x), None, Context())
    scores = jnp.einsum("tgrk,sgk->grts", q[0].reshape(len(tokens), 2, 2, -1), k[0]) / np.sqrt(k.shape[-1])
    return jnp.sum(jax.nn.softmax(jnp.where(np.tri(len(tokens), dtype=bool), scores, -jnp.inf)), axis=(0, 1))


def plain_loop(context, sentences, question):
    """The method as its source states it, one token list at a time; and the keys read."""
    kept, read, start = [], 0, 0
    while start < len(context):
        stop = min(start + READING.window, len(context))
        while stop < len(context) and sentences[stop] == sentences[stop - 1]:
            stop -= 1
        candidates = kept + list(range(start, stop))
        asked = np.zeros(READING.budget + READING.window + QUESTION, np.int32)  # of one shape: compiled once
        asked[: len(candidates) + QUESTION] = *context[candidates], *question
        rows = np.asarray(attention(asked))[len(candidates) :][:QUESTION, : len(candidates)]
        read += sum(len(candidates) + i + 1 for i in range(QUESTION))
        smooth = [np.convolve(row, np.ones(READING.phrase), "full")[2:][: len(candidates)] for row in rows]
        score = np.sum(smooth, axis=0)
        best = {}
        for place in np.argsort(-score)[: READING.top]:
            best.setdefault(sentences[candidates[place]], score[place])
        kept, room = set(), READING.budget
        for sentence in best:
            whole = [token for token in candidates if sentences[token] == sentence]
            if len(whole) > room:
                break
            kept, room = kept | set(whole), room - len(whole)
        kept, start = sorted(kept), stop
    return kept, read


def test_it_keeps_what_a_plain_loop_keeps():
    context, sentences, question = rows()
    kept, read = jax.jit(lambda *args: retrieve_sentences(MODEL, PARAMS, *args, READING))(context, sentences, question)
    context, sentences = np.asarray(context), np.asarray(sentences)
    assert kept.tokens.shape == (2, READING.budget)
    for row in range(2):
        expected, keys = plain_loop(context[row], sentences[row], question[row])
        assert 0 < len(expected) < LENGTH
        np.testing.assert_array_equal(kept.tokens[row][kept.valid[row]], context[row][expected])
        np.testing.assert_array_equal(kept.sentences[row][kept.valid[row]], sentences[row][expected])
        assert read[row] == keys


def test_a_context_of_one_window_is_read_whole():
    context, sentences, question = rows()
    kept, read = retrieve_sentences(MODEL, PARAMS, context, sentences, question, InfiniRetri(window=LENGTH))
    np.testing.assert_array_equal(kept.prompts(question), np.concatenate([context, question], axis=1))
    assert np.all(kept.valid) and not np.any(read)


@pytest.mark.parametrize("mixer, why", [(BaseConvolution(kernel=3), "has none"), (Landmark(block=4), "has landmarks")])
def test_a_model_without_such_scores_is_refused(mixer, why):
    stages = repeat(mixer, Attention(), depth=1 if why == "has none" else 2)
    model = FunctionalModel(LanguageModel(width=8, stages=stages), 4)
    zeros = jnp.zeros((1, 6), jnp.int32)
    with pytest.raises(UserError, match=why):
        retrieve_sentences(model, {}, zeros, zeros, zeros, InfiniRetri(window=4))
