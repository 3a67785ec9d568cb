"""Cache policies: full attention where the budget allows, footprints that are held, and refusals of what cannot be."""

import dataclasses

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.layers.mixer import Context
from recollect.layers.mixers.attention import Attention
from recollect.layers.mixers.sliding_window import SlidingWindow
from recollect.layers.modules.score_biases import Alibi
from recollect.layers.state import (
    CacheSizes,
    HeavyHitters,
    HiP,
    LongHeads,
    PyramidKV,
    Quantised,
    RecentTokens,
    Recycled,
    SnapKV,
    StreamingLLM,
    TaskKV,
    check_capacity,
)
from recollect.models import FunctionalModel, LanguageModel, repeat
from recollect.models.language_model import state_bytes
from tests.layers.state.policy_streams import DOCUMENTS, LENGTH, PROMPT, ROTARY, WIDTH, X, module_of, streamed

NOTHING_DROPPED = [
    RecentTokens(budget=LENGTH),
    StreamingLLM(budget=LENGTH),
    HeavyHitters(budget=LENGTH, sinks=2),
    Quantised(window=LENGTH),
    SnapKV(budget=LENGTH, window=4, recent=LENGTH),
    Recycled(top=LENGTH, every=6),
    Recycled(top=2, every=1),
    LongHeads(chunk=4, top=5),
    HiP(block=2, top=LENGTH, window=3, sinks=2, every=3),
    TaskKV(budget=LENGTH, recent=3),
]


@pytest.mark.parametrize("policy", NOTHING_DROPPED, ids=lambda policy: type(policy).__name__)
def test_a_policy_that_drops_nothing_is_full_attention(policy):
    expected = module_of(ROTARY)(X, Context(segments=jnp.asarray(DOCUMENTS))).hidden
    out, _, read = streamed(chz.replace(ROTARY, cache=policy), segments=DOCUMENTS)
    np.testing.assert_allclose(out * (DOCUMENTS != 0)[..., None], expected * (DOCUMENTS != 0)[..., None], atol=2e-5)
    assert read.keys[-1, 1] == LENGTH + (
        4 if isinstance(policy, LongHeads) else 0
    )  # its chunk keys, which are read to choose
    if read.mass is not None:
        np.testing.assert_allclose(read.mass[DOCUMENTS.T[PROMPT:] != 0], 1, rtol=1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_recent_tokens_are_a_sliding_window(sinks):
    window = {"sinks": "first", "first": sinks} if sinks else {}
    shape = {"heads": 4, "key_heads": 2, "positions": Alibi()}
    expected = module_of(SlidingWindow(window=5 - sinks, **window, **shape))(
        X, Context(segments=jnp.asarray(DOCUMENTS))
    ).hidden
    config = Attention(cache=RecentTokens(budget=5, sinks=sinks), **shape)
    for prompt in (0, 13):
        out, _, read = streamed(config, segments=DOCUMENTS, prompt=prompt)
        np.testing.assert_allclose(out[DOCUMENTS != 0], expected[DOCUMENTS != 0], atol=2e-5)
        assert read.keys[-1, 1] == 5


SMALL = [
    RecentTokens(budget=5),
    HeavyHitters(budget=5),
    Quantised(bits=4, window=4),
    LongHeads(chunk=3, top=3),
]


@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: type(policy).__name__)
def test_the_footprint_is_what_a_stream_holds_and_reads(policy):
    module = module_of(chz.replace(ROTARY, cache=policy))
    sizes = CacheSizes(1, LENGTH, 2, WIDTH // 4, WIDTH // 4, queries=2)
    state = module.init_state(1, LENGTH)
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size}) == sum(leaf.size > 0 for leaf in leaves)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state.cache))
    assert policy.footprint(sizes).bytes_held == held == state_bytes(state) - 3 * 4
    _, _, read = streamed(chz.replace(ROTARY, cache=policy), prompt=0)
    assert policy.footprint(sizes).keys_read == read.keys[-1, 0]


def test_lower_layers_of_a_pyramid_have_more_room():
    sizes = CacheSizes(1, 1000, 2, 4, 4, depth=4)
    budgets = [PyramidKV(budget=40, window=8).budget_of(dataclasses.replace(sizes, layer=layer)) for layer in range(4)]
    assert budgets == [78, 53, 27, 8]  # 78 to 2, but for the window
    model = LanguageModel(width=8, stages=repeat(Attention(cache=PyramidKV(budget=40, window=2, recent=1)), depth=3))
    states = FunctionalModel(model, 11).abstract_state(500)
    assert [state.cache.prompt.keys.shape[2] for state in states] == [78, 40, 2]


def test_a_short_cache_takes_no_more_than_it_was_made_for():
    module = module_of(chz.replace(ROTARY, cache=RecentTokens(budget=8)))
    with pytest.raises(UserError, match="room for 6 tokens"):
        module.extend(X[:, :7], module.init_state(2, 6))
    check_capacity(module.init_state(2, 9), jnp.ones((2, 50), jnp.int32))  # old ones make room


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match="sinks=4: must be below budget=4"):
        StreamingLLM(budget=4)
    with pytest.raises(UserError, match="recent=5"):
        HeavyHitters(budget=4, recent=5)
