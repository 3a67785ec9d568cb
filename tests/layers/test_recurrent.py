"""The base of recurrent mixers: the states of a mixer follow from what it calls."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.layers import (
    Attention,
    Context,
    Cursor,
    LinearAttention,
    MinGRU,
    Place,
    RecurrentConfig,
    RecurrentMixer,
    RecurrentState,
    SlidingWindow,
    Stream,
)
from recollect.layers.mixer import check_input
from recollect.layers.modules import merge_heads


@chz.chz(typecheck=True)
class TwoMemories(RecurrentConfig):
    """A recurrence on queries and keys, and one on those of the token before."""

    key_heads: int | None = None
    twice: bool = False

    def build(self, width, place, rngs):
        return TwoMemoriesMixer(self, width, place, rngs, self.sizes(width), kernel=3)


class TwoMemoriesMixer(RecurrentMixer):
    def mix(self, x, stream):
        q, k, v = self.heads(x, stream)
        o = stream.recurrence(q, k, v, name="first")
        o = o + stream.recurrence(q, stream.previous(k), v, name="first" if self.config.twice else "second")
        return self.output(merge_heads(o))


def build(**settings):
    return TwoMemories(**settings).build(8, Place(), nnx.Rngs(params=jax.random.key(0)))


def test_states_follow_from_the_calls():
    mixer = build(heads=4, key_heads=2, key_dim=5, value_dim=3)
    state = mixer.init_state(2, 100, jnp.bfloat16)
    shapes = {name: (part.shape, part.dtype.name) for name, part in state.parts.items()}
    assert shapes == {
        "query": ((2, 2, 10), "bfloat16"),
        "key": ((2, 2, 10), "bfloat16"),
        "value": ((2, 2, 12), "bfloat16"),
        "previous": ((2, 1, 10), "bfloat16"),
        "first": ((2, 4, 5, 3), "float32"),
        "second": ((2, 4, 5, 3), "float32"),
    }
    assert not any(part.any() for part in state.parts.values())


def test_the_token_before_is_the_documents():
    x = jnp.arange(1.0, 7.0)[None, :, None, None]
    segments = jnp.asarray([[1, 1, 2, 0, 2, 3]])
    assert Stream(Context(segments=segments)).previous(x)[0, :, 0, 0].tolist() == [0, 1, 0, 0, 3, 0]
    state = RecurrentState({"previous": jnp.full((1, 1, 1), 9.0)}, Cursor(jnp.asarray([4]), jnp.asarray([1])))
    assert Stream(Context(segments=segments), state).previous(x)[0, :, 0, 0].tolist() == [9, 1, 0, 0, 3, 0]


def test_any_split_is_the_whole():
    mixer = build()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)
    expected, state, outs = mixer(x).hidden, mixer.init_state(2, 12), []
    for start, end in ((0, 1), (1, 6), (6, 7), (7, 12)):
        out, state = mixer.extend(x[:, start:end], state)
        outs.append(out.hidden)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=1e-7)


def test_two_states_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two states of one mixer are called 'first'"):
        build(twice=True).init_state(1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide the model width 8"),
        ({"heads": 4, "key_heads": 3}, "key_heads=3: must divide heads=4"),
        ({"heads": 0}, "heads=0: must be at least 1"),
        ({"key_dim": 0}, "key_dim=0: must be at least 1"),
    ],
)
def test_impossible_sizes(settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
    assert build(heads=3, key_dim=2, value_dim=2).output.kernel.shape == (6, 8)


@pytest.mark.parametrize("config", [Attention(heads=2), SlidingWindow(heads=2), LinearAttention(heads=2), MinGRU()])
def test_inputs_of_another_shape_are_refused(config):
    mixer = config.build(16, Place(), nnx.Rngs(0))
    message = r"it must be \(batch, tokens, 16\), the width of this mixer"
    for call in (lambda x: mixer(x), lambda x: mixer.extend(x, mixer.init_state(2, 8))):
        with pytest.raises(ValueError, match=message):
            call(jnp.zeros((2, 8, 32)))
    with pytest.raises(ValueError, match=message):
        check_input(jnp.zeros((8, 16)), 16)
