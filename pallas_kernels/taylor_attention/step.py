"""One token, for decoding."""

from __future__ import annotations

from jaxtyping import Array, Float

from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence
from recollect.pallas_kernels.taylor_attention.features import count
from recollect.pallas_kernels.taylor_attention.reference import taylor_attention


def taylor_attention_step(
    state: Float[Array, "b h f columns"],
    q: Float[Array, "b g k"],
    k: Float[Array, "b g k"],
    v: Float[Array, "b h v"],
    *,
    scale: float | None = None,
    normalise: bool = True,
    epsilon: float = 1e-12,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h f columns"]]:
    """Advances the state by one token and reads it; XLA makes one pass over the state, which is all the memory traffic.

    `taylor_attention` does the same for one token that comes with a state.

    Args:
      state: (b, h, features, v + 1) fp32, v columns without a normaliser.
      q, k: (b, g, k); v: (b, h, v). The rest as `taylor_attention`'s.

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
    scale = key_dim**-0.5 if scale is None else scale
    inputs = Recurrence(q[:, None], k[:, None], v[:, None], initial_state=state, scale=scale)
    o, after = taylor_attention(inputs, normalise=normalise, epsilon=epsilon, return_state=True)
    assert after is not None
    return o[:, 0], after
