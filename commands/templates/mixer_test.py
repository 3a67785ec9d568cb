"""NewMixer computes its equation. The laws of all mixers are in tests/layers/test_mixer_laws.py."""

import jax
import numpy as np
from flax import nnx

from recollect.layers import NewMixer, Place


def test_the_equation():
    """Against a loop over tokens."""
    mixer = NewMixer(heads=2).build(8, Place(), nnx.Rngs(params=jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    q, k, v = (np.asarray(part(x)[0]).reshape(6, 2, 4) for part in (mixer.query, mixer.key, mixer.value))
    decay = np.asarray(jax.nn.sigmoid(mixer.rate[...]))[:, None, None]
    memory, outputs = np.zeros((2, 4, 4)), []
    for t in range(6):
        memory = decay * memory + (1 - decay) * np.einsum("hk,hv->hkv", k[t], v[t])
        outputs.append(np.einsum("hk,hkv->hv", q[t], memory).reshape(8))
    expected = np.stack(outputs) @ np.asarray(mixer.output.kernel[...])
    np.testing.assert_allclose(mixer(x).hidden[0], expected, rtol=1e-4, atol=1e-6)
