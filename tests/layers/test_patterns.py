"""Every mixer's row of the four patterns (layers/patterns.py): what it serves, proven by perturbing inputs, and why it
does not serve the rest. That what is causal in itself is so, token by token, is law 1."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect import layers
from recollect.configuration import UserError
from recollect.layers import Context, Pattern, Source, in_pattern
from recollect.layers.mixer import Place

WIDTH, TOKENS, OTHERS = 8, 5, 3
"""Of a sequence, and of the source beside it."""

ROWS = [(cls, pattern) for cls in layers.MIXERS for pattern in (Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS)]
FIRST = (layers.Attention, layers.SlidingWindow, layers.GatedAttention, layers.LinearAttention)
"""Whose rows `make test` proves; a cross mixer is one program for both cross patterns."""


def served(cls, pattern):
    """Returns the config in a pattern, or the reason why it does not serve it."""
    try:
        return in_pattern(cls(), pattern)
    except UserError as error:
        return str(error)


@functools.cache
def changes(config):
    """Returns what adding 1 to one input changes of each output, (inputs, outputs): inputs of the sequence, or where
    the mixer is cross of the sequence and then of the source."""
    module = config.build(WIDTH, Place(1, 4), nnx.Rngs(params=jax.random.key(0)))
    graph, weights = nnx.split(module)
    weights = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), weights)
    tokens = TOKENS + OTHERS * config.traits.cross
    rows = jnp.concatenate([jnp.zeros((1, tokens)), jnp.eye(tokens)])[..., None]
    values = jax.random.normal(jax.random.key(1), (tokens, WIDTH)) + rows

    def run(weights, values):
        source = Source(values[:, TOKENS:]) if config.traits.cross else None
        return nnx.merge(graph, weights)(values[:, :TOKENS], Context(source=source)).hidden

    out = np.asarray(jax.jit(run)(weights, values))
    return np.abs(out[1:] - out[0]).max(axis=-1)


@pytest.mark.parametrize(
    ("cls", "pattern"),
    [
        pytest.param(*row, id=f"{row[0].__name__}-{row[1].value}", marks=[] if row[0] in FIRST else [pytest.mark.more])
        for row in ROWS
        if not isinstance(served(*row), str)
    ],
)
def test_a_pattern_that_is_served(cls, pattern):
    config = served(cls, pattern)
    assert config.traits.cross == pattern.cross
    changed = changes(config)
    own = np.eye(TOKENS, dtype=bool)
    if pattern.cross:  # every token of the source, and of the queries its own alone: so it is causal, too
        assert (changed[TOKENS:] > 1e-6).all() and (changed[:TOKENS][own] > 1e-6).all()
        later = np.triu(np.ones_like(own), 1).T.astype(bool)
        assert (changed[:TOKENS][later] == 0).all() and config.traits.causal
        assert served(cls, Pattern.CAUSAL_CROSS) == config
    else:
        after = np.eye(TOKENS, k=-1, dtype=bool)  # what the next input changes
        assert (changed[own] > 1e-6).all()
        assert (changed[after] > 1e-6).all() and not config.traits.causal


@pytest.mark.parametrize("cls", layers.MIXERS, ids=lambda cls: cls.__name__)
def test_a_pattern_that_is_not_served_says_why(cls):
    for pattern in Pattern:
        if isinstance(reason := served(cls, pattern), str):
            assert pattern is not Pattern.CAUSAL_SELF and cls.__name__ in reason
            assert "its config has no field" not in reason, reason
