"""Encoders, encoder-decoders, prefixes, classes and continuous inputs: models of the same blocks."""

from __future__ import annotations

import dataclasses

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import Attention, Context, Source
from recollect.layers.modules import LearnedPositions, PrefixLM, Rotary
from recollect.models import (
    Classifier,
    Encoder,
    FunctionalModel,
    LanguageModel,
    Projector,
    Sampling,
    generate,
    parameters_by_part,
    repeat,
)
from recollect.pallas_kernels.masks import ORDINARY, PERCEPT, PREFIX

T, S, WIDTH, VOCABULARY = 6, 5, 8, 11
BOTH_WAYS = Attention(heads=2, positions=Rotary(), causal=False)
DECODER = LanguageModel(
    width=WIDTH,
    stages=repeat(Attention(heads=2, positions=Rotary()), Attention(heads=2, cross=True), depth=2),
    encoder=Encoder(stages=repeat(BOTH_WAYS, depth=1), positions=LearnedPositions(maximum=9)),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, T)), jnp.int32)
SOURCE = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (2, S)), jnp.int32)
# Row 0: two documents, each with a source of its own, in another order; padding in both.
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1] * T], jnp.int32)
SOURCE_SEGMENTS = jnp.asarray([[2, 2, 0, 1, 1], [1] * S], jnp.int32)


def made(config: LanguageModel):
    """Returns the model, and parameters large enough that every path matters."""
    model = FunctionalModel(config, VOCABULARY)
    params = model.init(jax.random.key(0))
    return model, jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), params)


def of(ids, segments=None) -> Source:
    return Source(context=Context(token_ids=ids, segments=segments))


def test_an_encoder_decoder_reads_the_source_of_each_document_and_streams():
    model, params = made(DECODER)
    full = jax.jit(lambda params, tokens, context: model.bind(params)(tokens, context))
    packed = Context(segments=SEGMENTS, source=of(SOURCE, SOURCE_SEGMENTS))
    logits = np.asarray(full(params, TOKENS, packed))
    for token, documents in ((0, {2}), (1, {2}), (3, {1}), (2, set())):  # of the source's row 0
        changed = dataclasses.replace(packed, source=of(SOURCE.at[0, token].add(1) % VOCABULARY, SOURCE_SEGMENTS))
        off = np.abs(np.asarray(full(params, TOKENS, changed)) - logits).max(-1)
        reads = np.isin(np.asarray(SEGMENTS), [*documents, -1]) & (np.arange(2)[:, None] == 0)
        assert (off[reads] > 1e-5).all() and (off[~reads] == 0).all()
    later = np.asarray(full(params, TOKENS.at[:, 4].add(1) % VOCABULARY, packed))
    np.testing.assert_array_equal(later[:, :4], logits[:, :4])

    start = jax.jit(lambda params, source: model.bind(params).init_state(2, T, source))
    extend = jax.jit(
        lambda params, tokens, state, segments: model.bind(params).extend(tokens, state, Context(segments=segments))
    )
    state, outs = start(params, packed.source), []
    for i in range(0, T, 2):
        hidden, state = extend(params, TOKENS[:, i : i + 2], state, SEGMENTS[:, i : i + 2])
        outs.append(model.bind(params).logits(hidden))
    real = np.asarray(SEGMENTS != 0)
    np.testing.assert_allclose(np.concatenate(outs, axis=1)[real], logits[real], rtol=1e-4, atol=1e-5)
    assert parameters_by_part(model)["encoder"] > 0
    with pytest.raises(UserError, match="reads a source"):
        model.bind(params)(TOKENS)


def test_an_encoder_sees_both_sides_of_a_masked_token_and_cannot_stream():
    model, params = made(LanguageModel(width=WIDTH, stages=repeat(BOTH_WAYS, depth=1)))
    full = jax.jit(lambda params, tokens: model.bind(params)(tokens))
    base = np.asarray(full(params, TOKENS))
    for place in (0, T - 1):
        changed = np.asarray(full(params, TOKENS.at[:, place].add(1) % VOCABULARY))
        assert (np.abs(changed - base).max(-1) > 1e-6).all()
    with pytest.raises(UserError, match="has no stream"):
        model.bind(params).init_state(1, T)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_a_classifier_pools_what_is_not_padding(pool):
    config = LanguageModel(width=WIDTH, stages=repeat(BOTH_WAYS, depth=1), classifier=Classifier(classes=3, pool=pool))
    model, params = made(config)
    segments = jnp.asarray([[0, 1, 1, 1, 0, 0], [1] * T], jnp.int32)
    full = jax.jit(lambda params, tokens: model.bind(params)(tokens, Context(segments=segments)))
    logits = np.asarray(full(params, TOKENS))
    assert logits.shape == (2, 1, 3)
    other = np.asarray(full(params, TOKENS.at[:, 5].add(1) % VOCABULARY))  # padding of row 0
    np.testing.assert_array_equal(other[0], logits[0])
    assert np.abs(other[1] - logits[1]).max() > 1e-5
    whole = chz.replace(config, classifier=None)
    alone = dict(params)
    head = np.asarray(alone.pop("classifier")["head"]["kernel"])
    hidden = np.asarray(
        FunctionalModel(whole, VOCABULARY).bind(alone).hidden(TOKENS, Context(segments=segments)).hidden
    )
    pooled = {"mean": hidden[0, 1:4].mean(0), "first": hidden[0, 1], "last": hidden[0, 3]}[pool]
    np.testing.assert_allclose(logits[0, 0], pooled @ head, rtol=1e-4, atol=1e-5)


def test_continuous_inputs_and_a_prefix_that_sees_itself():
    config = LanguageModel(
        width=WIDTH,
        stages=repeat(Attention(heads=2, design=PrefixLM(token_type=PERCEPT)), depth=1),
        projector=Projector(channels=3, hidden=4),
    )
    model, params = made(config)
    types = jnp.asarray([[PERCEPT] * 3 + [ORDINARY] * 3, [ORDINARY] * 2 + [PERCEPT] * 2 + [ORDINARY] * 2], jnp.int32)
    vectors = jax.random.normal(jax.random.key(2), (2, T, 3))
    full = jax.jit(
        lambda params, tokens, vectors: model.bind(params)(tokens, Context(token_types=types, vectors=vectors))
    )
    base = np.asarray(full(params, TOKENS, vectors))
    is_percept = np.asarray(types == PERCEPT)
    ids = jnp.where(types == PERCEPT, (TOKENS + 1) % VOCABULARY, TOKENS)
    np.testing.assert_array_equal(full(params, ids, jnp.where(is_percept[..., None], vectors, jnp.nan)), base)
    last = np.abs(np.asarray(full(params, TOKENS, vectors.at[:, [2, 3]].add(1.0))) - base).max(-1)
    assert (last[is_percept] > 1e-6).all() and (last[1, :2] == 0).all()  # text before it does not see it
    with pytest.raises(UserError, match="projector takes"):
        model.bind(params)(TOKENS, Context(token_types=types, vectors=vectors[..., :2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "need model.encoder"),
        ({"stages": repeat(Attention(), depth=1)}, "need model.encoder"),
    ],
)
def test_an_encoder_and_cross_mixers_need_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        chz.replace(DECODER, **changes)


def test_generation_reads_sources_and_shows_prompts_of_a_prefix_whole():
    """Greedy tokens of a decoder beside sources of different lengths, and of a prefix model, are those of whole
    sequences."""
    prefix = LanguageModel(width=WIDTH, stages=repeat(Attention(heads=2, design=PrefixLM()), depth=1))
    sources = [[3, 1, 4, 1], [5, 9]]
    for config in (DECODER, prefix):
        model, params = made(config)
        more = {"sources": sources} if config is DECODER else {}
        found = generate(model, params, [[1, 2, 3], [7, 8, 2]], 2, Sampling(temperature=0), **more)
        for row, prompt in enumerate(([1, 2, 3], [7, 8, 2])):
            types = jnp.asarray([[PREFIX] * 3 + [ORDINARY]])
            tokens = jnp.asarray([[*prompt, int(found[row, 0])]])
            source = of(jnp.asarray([sources[row]])) if more else None
            context = Context(token_types=types, source=source)
            logits = np.asarray(model.bind(params)(tokens, context))[0]
            np.testing.assert_array_equal(logits[2:].argmax(-1), found[row])
    with pytest.raises(UserError, match="needs a source"):
        generate(made(DECODER)[0], params, [[1]], 1)
