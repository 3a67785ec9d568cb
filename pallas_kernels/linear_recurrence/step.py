"""One token of the recurrence, for decoding."""

from __future__ import annotations

from jaxtyping import Array, Float

from recollect.pallas_kernels.linear_recurrence.recurrence import Recurrence
from recollect.pallas_kernels.linear_recurrence.reference import linear_recurrence


def linear_recurrence_step(
    state: Float[Array, "b h k v"],
    q: Float[Array, "b g k"],
    k: Float[Array, "b g k"],
    v: Float[Array, "b h v"],
    *,
    log_decay: Float[Array, " h"] | Float[Array, "b h"] | Float[Array, "b h k"] | None = None,
    value_log_decay: Float[Array, "b h v"] | None = None,
    write_strength: Float[Array, "b h"] | Float[Array, "b h v"] | None = None,
    erase_read: Float[Array, "b h k"] | None = None,
    erase_write: Float[Array, "b h k"] | None = None,
    erase_before_decay: bool = False,
    scale: float = 1.0,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h k v"]]:
    """Advances the state by one token and reads it; XLA makes one pass over the state, which is all the memory traffic.

    `linear_recurrence` does the same for one token that comes with a state.

    Args:
      state: (b, h, k, v) fp32, S_{t-1}.
      q, k: (b, g, k); v: (b, h, v). The rest as `linear_recurrence`'s, without the token axis.

    Returns:
      o (b, h, v) in v's dtype, and S_t.

    Raises:
      ValueError: the state's shape does not fit the rest.
    """
    expected = (*v.shape[:2], k.shape[2], v.shape[2])
    if state.shape != expected:
        raise ValueError(f"linear_recurrence_step: state must be {expected}; got {state.shape}")
    per_token = {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": log_decay,
        "value_log_decay": value_log_decay,
        "write_strength": write_strength,
        "erase_read": erase_read,
        "erase_write": erase_write,
    }
    rows = {name: x if x is None or x.ndim == 1 else x[:, None] for name, x in per_token.items()}
    inputs = Recurrence(**rows, initial_state=state, erase_before_decay=erase_before_decay, scale=scale)
    o, after = linear_recurrence(inputs, return_state=True)
    assert after is not None
    return o[:, 0], after
