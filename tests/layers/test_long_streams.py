"""100,000 tokens through every recurrent mixer, in pieces of 256 by `extend`: states of one size, finite outputs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from recollect import layers
from recollect.layers.mixer import Place
from recollect.layers.recurrent import StreamMixer

PIECES, PIECE, WIDTH = 391, 256, 16

LONGER = {name: {"levels": 18} for name in ("LogLinearMamba2", "LogLinearGatedDeltaNet")}
"""Settings of mixers whose default is for shorter documents: 2^17 tokens."""


def modules():
    """Recurrent mixers in their default configuration, as far as it takes such streams, by name."""
    configs = {cls.__name__: cls(**LONGER.get(cls.__name__, {})) for cls in layers.MIXERS}
    rngs = nnx.Rngs(params=jax.random.key(0))
    each = {name: config.build(WIDTH, Place(0, 2), rngs) for name, config in configs.items()}
    return {name: module for name, module in each.items() if isinstance(module, StreamMixer)}


@pytest.mark.slow
def test_a_long_stream_needs_no_more_memory_than_a_short_one():
    """One program per mixer: the state is what a scan over the pieces carries, so its size cannot change."""
    assert PIECES * PIECE >= 100_000
    for name, module in modules().items():
        graph, weights = nnx.split(module)

        def piece(state, key, graph=graph, weights=weights):
            out, state = nnx.merge(graph, weights).extend(jax.random.normal(key, (1, PIECE, WIDTH)), state)
            return state, (jnp.isfinite(out.hidden).all(), jnp.sqrt(jnp.mean(out.hidden**2)))

        before = module.init_state(1, PIECES * PIECE)
        short = jax.eval_shape(lambda module=module: module.init_state(1, PIECE))
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(lambda leaf: leaf.shape, short), name
        after, (finite, sizes) = jax.jit(lambda state, keys, piece=piece: jax.lax.scan(piece, state, keys))(
            before, jax.random.split(jax.random.key(1), PIECES)
        )
        assert finite.all() and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after)), name
        assert after.cursor.position.tolist() == [PIECES * PIECE], name
        # What the last pieces read is of the size of what early ones do, which RWKV-7 starts at 0: nothing builds up.
        assert sizes[-50:].mean() <= 10 * sizes[10:60].mean(), name
