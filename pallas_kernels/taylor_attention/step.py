"""One token, for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.taylor_attention.features import count
from recollect.pallas_kernels.taylor_attention.reference import advanced, read


def taylor_attention_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    normalise: bool = True,
    epsilon: float = 1e-12,
) -> tuple[jax.Array, jax.Array]:
    """Advances the state by one token and reads it; XLA makes one pass over the state of it, which is all the traffic
    there is.

    Args: as `taylor_attention`'s without the token axis.
      state: (b, h, features, v + 1) fp32, v columns without a normaliser.
      q, k: (b, hk, k); v: (b, h, v).

    Returns:
      o (b, h, v) in v's dtype, and the next state.

    Raises:
      ValueError: the state's shape does not fit the rest.
    """
    b, h, value_dim = v.shape
    key_dim = k.shape[2]
    expected = (b, h, count(key_dim), value_dim + int(normalise))
    if state.shape != expected:
        raise ValueError(f"taylor_attention_step: state must be {expected}; got {state.shape}")
    q, k = (jnp.repeat(x, h // x.shape[1], axis=1).astype(state.dtype) for x in (q, k))
    state = advanced(state, k, v.astype(state.dtype), normalise)
    return read(state, q, key_dim**-0.5 if scale is None else scale, normalise, epsilon).astype(v.dtype), state
