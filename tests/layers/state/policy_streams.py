"""An attention mixer with a cache policy, streamed: what the tests of policies share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recollect.layers.mixer import Context, Place
from recollect.layers.mixers.attention import Attention
from recollect.layers.modules.positions import Rotary
from recollect.layers.state import measured_reads

LENGTH, WIDTH, PROMPT = 20, 16, 7
ROTARY = Attention(heads=4, key_heads=2, positions=Rotary())
X = 20 * jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
DOCUMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2], [1] * LENGTH], np.int32)


@functools.cache
def module_of(config):
    return config.build(WIDTH, Place(), nnx.Rngs(params=jax.random.key(0)))


def streamed(config, x=X, segments=None, prompt=PROMPT, length=LENGTH):
    """Outputs of a prefill and then one token at a time in a scan, the last state, and what each step read."""
    module = module_of(config)
    segments = np.ones(x.shape[:2], np.int32) if segments is None else segments

    def step(state, part):
        x, segments = part
        with measured_reads() as layers:
            out, state = module.extend(x[:, None], state, Context(segments=segments[:, None]))
        (reads,) = layers
        return state, (out.hidden[:, 0], reads)

    @jax.jit
    def run(x, segments):
        state, outs = module.init_state(len(x), length), []
        if prompt:
            out, state = module.extend(x[:, :prompt], state, Context(segments=segments[:, :prompt]))
            outs.append(out.hidden)
        state, (rest, read) = jax.lax.scan(step, state, (x[:, prompt:].swapaxes(0, 1), segments[:, prompt:].T))
        return jnp.concatenate([*outs, rest.swapaxes(0, 1)], axis=1), state, read

    return run(x, jnp.asarray(segments))
