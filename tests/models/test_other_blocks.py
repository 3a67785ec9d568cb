"""Blocks of a normalised stream beside their equation; streams; what they are refused with."""

import jax
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers import LinearAttention
from recollect.layers.modules import GELU
from recollect.models import Canon, repeat
from recollect.models.activations import activations
from tests.models.probes import functional

SETTINGS = {"width": 16, "stages": repeat(LinearAttention(heads=2), depth=2), "mlp": GELU(hidden=12)}


def test_a_normalised_stream():
    model, params = functional(vocabulary=24, residual="normalised", **SETTINGS)
    bound = model.bind(jax.tree.map(lambda leaf: leaf + 0.3 * np.sin(np.arange(leaf.size)).reshape(leaf.shape), params))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 24)
    x = bound.embedding[...][tokens]
    for block in bound.stack.layers():
        y = block.mixer_norm(x)
        y = block.mlp_norm(y + block.mixer(y).hidden)
        x = y + block.mlp(y)
    whole = bound.hidden(tokens).hidden
    np.testing.assert_allclose(whole, bound.final_norm(x), atol=1e-5)
    state, outs = bound.init_state(2, 12), []
    for part in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):
        out, state = bound.extend(part, state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(dict(activations(bound, tokens))["final norm"], whole, atol=1e-5)


def test_canon_layers_are_refused():
    with pytest.raises(UserError, match="residual='normalised': Canon layers"):
        functional(vocabulary=24, residual="normalised", canon=Canon(), **SETTINGS)
