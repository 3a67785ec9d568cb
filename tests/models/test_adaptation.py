"""Low-rank updates and frozen parameters of every mixer's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.configuration.io import flatten
from recollect.layers import Attention, Hyena, LinearAttention, MixtureOfHeads
from recollect.models import FunctionalModel, LanguageModel, LoRA, repeat, trainable_parameters
from recollect.models.adaptation import matching, merged, nested

TOKENS = np.arange(12, dtype=np.int32)[None] % 8


def model(mixer, **lora):
    config = LanguageModel(width=16, stages=repeat(mixer, depth=2), lora=LoRA(**lora) if lora else None)
    return FunctionalModel(config, 8)


def logits(model, params):
    return model.bind(params)(jnp.asarray(TOKENS))


@pytest.mark.parametrize(
    "mixer",
    [Attention(heads=2), LinearAttention(heads=2), Hyena(), MixtureOfHeads(heads=2, shared=1, active=1)],
    ids=repr,
)
def test_updates_change_nothing_at_first_and_merge_into_plain_weights(mixer):
    adapted, plain = model(mixer, rank=2), model(mixer)
    params = adapted.init(jax.random.key(0))
    base = plain.init(jax.random.key(0))
    np.testing.assert_array_equal(logits(adapted, params), logits(plain, base))
    updates = {name: leaf for name, leaf in flatten(params).items() if name.startswith("lora.")}
    assert updates and all(leaf.shape[0] == 2 for leaf in updates.values())  # one for each of the two layers
    moved = nested(flatten(params) | {name: leaf + 0.1 for name, leaf in updates.items()})
    weights, config = merged(moved, adapted.config, 8)
    assert config == plain.config and flatten(weights).keys() == flatten(base).keys()
    changed = np.asarray(logits(adapted, moved))
    np.testing.assert_allclose(logits(plain, weights), changed, rtol=1e-6, atol=1e-6)
    assert np.abs(changed - np.asarray(logits(plain, base))).max() > 1e-3


def test_only_updates_have_a_gradient_and_are_trainable():
    adapted = model(Attention(heads=2), rank=2, layers="*.query,*.value")
    params = adapted.init(jax.random.key(0))
    gradient = flatten(jax.grad(lambda params: jnp.sum(logits(adapted, params) ** 2))(params))
    trained = flatten(adapted.tags("trainable"))
    assert {name.split(".")[-2] for name, tag in trained.items() if tag} == {"query", "value"}
    for name, leaf in gradient.items():
        assert bool(jnp.any(leaf != 0)) == (trained[name] and name.endswith(".b")), name  # of A, once B is not 0
    assert trainable_parameters(adapted) == 2 * 2 * (16 * 2 + 2 * 16)
    assert all(flatten(model(Attention(heads=2), rank=2, train_rest=True).tags("trainable")).values())


def test_patterns_match_whole_names_and_parts_up_to_a_dot():
    names = ["embedding", "stack.stages.0.query.kernel", "stack.stages.0.value.kernel", "final_norm.gain"]
    assert matching("embedding, final_norm", names, "x") == {"embedding", "final_norm.gain"}
    assert matching(("*.query",), names, "x") == {"stack.stages.0.query.kernel"} == matching("*query*", names, "x")
    for pattern, hint in (("embeding", "embedding"), ("query", r"\*\.query"), ("stak.*", "stack")):
        with pytest.raises(
            UserError, match=rf"x={pattern.replace('*', '.')}: matches no parameter; did you mean .*{hint}"
        ):
            matching(pattern, names, "x")
