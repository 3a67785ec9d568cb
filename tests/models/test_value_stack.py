"""Layers that mix in the first layer's values: scanned, one after another, streamed and recomputed, they agree."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import RWKV7, Attention
from recollect.layers.mixer import Place
from recollect.models import LanguageModel, Stage
from recollect.models.activations import activations
from recollect.models.functional import FunctionalModel

FIRST, LATER = (RWKV7(heads=2, rank=3, value_residual=mixes) for mixes in (False, True))
CONFIG = LanguageModel(width=8, stages=(Stage(pattern=(FIRST,)), Stage(pattern=(LATER, Attention()), repeats=2)))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 7)))


@pytest.fixture(scope="module")
def params():
    """Away from initial values, with which no mixer adds anything."""
    params = FunctionalModel(CONFIG, 9).init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)


def hidden(config, params):
    return FunctionalModel(config, 9).bind(params).hidden(TOKENS).hidden


def test_scanned_unrolled_and_streamed_layers_agree(params):
    whole = jax.jit(lambda params: hidden(CONFIG, params))(params)
    model = FunctionalModel(CONFIG, 9).bind(params)
    *_, (_, one_by_one) = activations(model, TOKENS)
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-4, atol=1e-5)
    state = model.init_state(2, 7)
    extend = jax.jit(lambda params, tokens, state: FunctionalModel(CONFIG, 9).bind(params).extend(tokens, state))
    for first in range(0, 6, 3):
        out, state = extend(params, TOKENS[:, first : first + 3], state)
        np.testing.assert_allclose(out, whole[:, first : first + 3], rtol=1e-4, atol=1e-5)
    without = chz.replace(CONFIG, stages=(Stage(pattern=(FIRST,)), Stage(pattern=(FIRST, Attention()), repeats=2)))
    assert np.abs(hidden(without, params_of(without, params)) - whole).max() > 1e-2


def params_of(config, params):
    """Those of `params` that the model has."""
    stages = params["stack"]["stages"]
    rest = {name: part for name, part in stages["1"]["0"]["mixer"].items() if name != "value_share"}
    later = {**stages["1"], "0": {**stages["1"]["0"], "mixer": rest}}
    return {**params, "stack": {"stages": {**stages, "1": later}}}


def test_a_recomputed_layer_has_the_same_gradient(params):
    losses = [lambda params, c=c: jnp.sum(hidden(c, params) ** 2) for c in (CONFIG, chz.replace(CONFIG, remat="full"))]
    one, other = (jax.jit(jax.grad(loss))(params) for loss in losses)
    assert np.abs(one["stack"]["stages"]["0"]["0"]["mixer"]["value"]["kernel"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, other)


def test_what_has_no_values_to_mix_in_is_refused():
    for stages, message in (
        ((Stage(pattern=(LATER,)),), "the first RWKV7 has no values before it"),
        ((Stage(pattern=(RWKV7(heads=1, value_dim=3), LATER)),), "heads and value_dim of every RWKV7 to be equal"),
    ):
        with pytest.raises(UserError, match=message):
            chz.replace(CONFIG, stages=stages).build(9, nnx.Rngs(params=0))
    alone = LATER.build(8, Place(1, 2), nnx.Rngs(params=0))
    with pytest.raises(UserError, match="it needs a model"):
        alone(jnp.zeros((1, 2, 8)))
