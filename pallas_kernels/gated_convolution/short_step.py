"""One token of the short convolution."""

from __future__ import annotations

from jaxtyping import Array, Float

from recollect.pallas_kernels.gated_convolution import short_xla
from recollect.pallas_kernels.gated_convolution.short import Activation, check_short


def short_convolution_step(
    state: Float[Array, "b past d"],
    x: Float[Array, "b d"],
    taps: Float[Array, "past+1 d"],
    bias: Float[Array, " d"] | None = None,
    *,
    in_gate: Float[Array, "b d"] | None = None,
    out_gate: Float[Array, "b d"] | None = None,
    activation: Activation = "none",
) -> tuple[Float[Array, "b d"], Float[Array, "b past d"]]:
    """Computes one token of `short_convolution`, O(k d) per row.

    Args:
      state: (b, k - 1, d), as `short_convolution` returns it; zeros start a document.
      x: (b, d).
      taps, bias: as of `short_convolution`.
      in_gate, out_gate: (b, d) or None.
      activation: as of `short_convolution`.

    Returns:
      y (b, d) in x's dtype, and the state after it, in `state`'s dtype.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"short_convolution_step: x must be (b, d); got {x.shape}")
    in_gate, out_gate = (None if gate is None else gate[:, None] for gate in (in_gate, out_gate))
    check_short(x[:, None], taps, bias, in_gate, out_gate, activation, state, None, None)
    y, after = short_xla.short_convolution(
        x[:, None],
        taps,
        bias,
        in_gate=in_gate,
        out_gate=out_gate,
        activation=activation,
        initial_state=state,
        segment_ids=None,
        initial_segment=None,
        return_state=True,
    )
    assert after is not None
    return y[:, 0], after
