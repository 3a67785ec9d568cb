"""One token of the recurrence, for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.reference import advanced


def linear_recurrence_step(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    value_log_decay: jax.Array | None = None,
    write_strength: jax.Array | None = None,
    erase_read: jax.Array | None = None,
    erase_write: jax.Array | None = None,
    erase_before_decay: bool = False,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Advances the state by one token and reads it; XLA makes one pass over the state of it, which is all the traffic
    there is.

    Args: as `linear_recurrence`'s without the token axis.
      state: (b, h, k, v) fp32, S_{t-1}.
      q, k: (b, hk, k); v: (b, h, v).
      log_decay: None, (h,), (b, h) or (b, h, k). value_log_decay: None or (b, h, v).
      write_strength: None, (b, h) or (b, h, v).
      erase_read, erase_write: None or (b, h, k).

    Returns:
      o (b, h, v) in v's dtype, and S_t.

    Raises:
      ValueError: the state's shape does not fit the rest.
    """
    b, h, value_dim = v.shape
    key_dim = k.shape[2]
    if state.shape != (b, h, key_dim, value_dim):
        raise ValueError(f"linear_recurrence_step: state must be {(b, h, key_dim, value_dim)}; got {state.shape}")
    q, k = (jnp.repeat(x, h // x.shape[1], axis=1) for x in (q, k))
    x = {"k": k, "v": v if write_strength is None else _by_channel(write_strength, 3) * v}
    if log_decay is not None:
        x["g"] = jnp.broadcast_to(_by_channel(log_decay, 3), (b, h, key_dim))
    if value_log_decay is not None:
        x["c"] = value_log_decay
    if erase_read is not None:
        x |= {"e": erase_read, "u": k if erase_write is None else erase_write}
    state = advanced(state, {name: y.astype(state.dtype) for name, y in x.items()}, erase_before_decay)
    o = jnp.einsum("bhk,bhkv->bhv", q.astype(state.dtype) * scale, state)
    return o.astype(v.dtype), state


def _by_channel(x: jax.Array, rank: int) -> jax.Array:
    return x if x.ndim == rank else x[..., None]
