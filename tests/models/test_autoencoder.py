"""The bottleneck: beside its equation in NumPy, and that nothing but the last token's vector passes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recollect.configuration import UserError
from recollect.data.synthetics import Compression
from recollect.layers import Attention, Landmark
from recollect.layers.mixer import Context
from recollect.models import Autoencoder, repeat

CONFIG = Autoencoder(width=8, stages=repeat(Attention(), depth=1))


@pytest.fixture(scope="module")
def built():
    module = CONFIG.build(6, nnx.Rngs(params=jax.random.key(0)))
    tokens = jax.jit(lambda: Compression(vocab_size=6, length=5).train_batch(0, 0).tokens[:2])()
    entered, context, _ = module.enter(tokens, Context())
    return module, tokens, np.asarray(module.stack(entered, context).hidden, np.float64)


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm.epsilon)


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def test_every_position_is_decoded_from_the_last_vector(built):
    module, tokens, x = built
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    y = x[:, -1:] + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for linear in module.decoder:
        y = gelu(rms_norm(y) @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...]))
    expected = rms_norm(y)
    np.testing.assert_allclose(module.hidden(tokens).hidden, expected, atol=2e-5 * np.abs(expected).max())
    passed = jax.jacobian(lambda x: module.leave(x))(jnp.asarray(x, jnp.float32))
    assert not np.any(passed[:, :, :, :, :-1]) and np.any(passed[:, :, :, :, -1])


def test_what_has_no_one_last_token_is_refused(built):
    module, tokens, _ = built
    with pytest.raises(UserError, match="without padding"):
        module.hidden(tokens, Context(segments=jnp.ones(tokens.shape, jnp.int32)))
    with pytest.raises(UserError, match="generates nothing"):
        module.extend(tokens, module.init_state(2, 5))
    with pytest.raises(UserError, match="last token's vector"):
        Autoencoder(width=8, stages=repeat(Landmark(block=4), depth=1))
    with pytest.raises(UserError, match="sinusoids need an even width"):
        Autoencoder(width=7, stages=repeat(Attention(heads=1), depth=1))
