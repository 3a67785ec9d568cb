"""Predicted landmarks: the loss beside labels of the longer sequence written out, and what reads which output."""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.data.batch import Batch
from recollect.layers import Landmark
from recollect.layers.mixer import Context
from recollect.models import LanguageModel, repeat
from recollect.training.loss import Loss, losses

T, WORDS = 11, 7
SEGMENTS = np.array([[1] * T, [2] * 7 + [3] * 3 + [0]])
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, WORDS)


def built(predicted=True, **settings):
    mixer = Landmark(block=3, heads=2, predicted=predicted)
    config = LanguageModel(width=8, stages=repeat(mixer, depth=2), **settings)
    graph, state = nnx.split(config.build(WORDS, nnx.Rngs(params=1)))
    state = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state)
    return nnx.merge(graph, state)


@pytest.mark.parametrize(("tied", "packed"), [(True, True), (False, False)])
def test_the_loss_is_that_of_a_vocabulary_with_landmarks(tied, packed):
    model = built(tied=tied)
    context = Context(segments=jnp.asarray(SEGMENTS) if packed else None)
    x, longer, _ = model.enter(TOKENS, context)
    hidden = np.asarray(model.final_norm(model.stack(x, longer).hidden), np.float64)
    words = np.where(np.asarray(longer.token_types) == 1, WORDS, np.asarray(longer.token_ids))
    segments = np.ones_like(words) if longer.segments is None else np.asarray(longer.segments)
    head = np.asarray(model.head_kernel(), np.float64)
    assert head.shape == (8, WORDS + 1)
    logs = hidden @ head
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    expected = 0.0
    for row in range(2):
        for i in range(words.shape[1] - 1):
            if segments[row, i] == segments[row, i + 1] != 0:
                expected -= logs[row, i, words[row, i + 1]]

    rows = np.ones_like(SEGMENTS) if not packed else SEGMENTS
    weights = (rows[:, :-1] == rows[:, 1:]) & (rows[:, 1:] != 0)
    places = jnp.broadcast_to(jnp.arange(T - 1), (2, T - 1))
    labels = {"targets": TOKENS[:, 1:], "target_positions": places, "weights": jnp.asarray(weights, jnp.float32)}
    batch = Batch(tokens=TOKENS, segments=context.segments, **labels)
    entropy, out = losses(model, batch, batch.weights, Loss())
    total = entropy.total + out.losses["landmarks"] * np.sum(rows != 0)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(out.sums.formed()[0]["landmarks"], out.losses["landmarks"])


def test_streams_read_the_same_outputs():
    model = built()
    assert model(TOKENS).shape == (2, T, WORDS)  # no landmark is generated
    whole, state = model.hidden(TOKENS).hidden, model.init_state(2, T)
    parts = []
    for start in range(0, T, 2):
        part, state = model.extend(TOKENS[:, start : start + 2], state)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_only_outputs_before_landmarks_differ():
    model, plain = built(), built(predicted=False)
    assert "landmarks" not in plain.hidden(TOKENS).losses
    differs = np.any(np.asarray(model.hidden(TOKENS).hidden != plain.hidden(TOKENS).hidden), axis=(0, 2))
    np.testing.assert_array_equal(differs, (np.arange(T) + 1) % 3 == 0)
    assert chz.asdict(model.config)["stages"][0]["pattern"][0]["predicted"]
