"""What streamed tokens read: every mixer that keeps keys reports it, and only where somebody measures."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from recollect import layers
from recollect.layers.mixer import Place
from recollect.layers.state import KeyValueCache, Reads, measured_reads, report


@pytest.mark.parametrize("cls", [cls for cls in layers.MIXERS if cls().traits.streams], ids=lambda cls: cls.__name__)
def test_mixers_that_keep_keys_report_what_they_read(cls):
    def run(x):
        module = cls().build(16, Place(), nnx.Rngs(params=jax.random.key(0)))
        with measured_reads() as reads:
            return reads, module.extend(x, module.init_state(2, 8))[1]

    reads, state = jax.eval_shape(run, jax.ShapeDtypeStruct((2, 1, 16), jnp.float32))
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, KeyValueCache))
    assert len(reads) == sum(isinstance(part, KeyValueCache) for part in parts)
    assert all(one.keys.shape == (2,) for one in reads)


def test_nothing_is_computed_where_nobody_measures():
    def never() -> Reads:
        raise AssertionError

    report(never)
    with measured_reads() as reads:
        pass
    report(never)
    assert not reads
