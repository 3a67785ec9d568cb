"""Causal depthwise convolutions, what gated-convolution layers are made of:

    short:  y_i = bias + sum_{j < k} taps[j] x_{i-j}          a few taps, streamed through a state of k - 1 inputs
    long:   y_i = sum_{j <= i} filter[i-j] x_j                a filter as long as the input

Each channel by itself; tap j multiplies the input j tokens back, so taps[0] is the current token's (torch's Conv1d stores them the
other way round). With segments, i - j counts the valid tokens between two tokens of one document: taps never cross documents, and
padding (segment 0), wherever it stands, takes no part and reads 0.

Gated short ones: Arora et al. 2024 (Based); long ones by Fourier transform: Poli et al. 2023 (Hyena, section 3).
"""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import always, choose
from pallas_kernels.gated_convolution import reference, xla


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Convolves with a few taps; sums in fp32.

    Args:
      x: (b, t, d).
      taps: (k, d); taps[0] multiplies the current token.
      bias: (d,) or None.
      initial_state: (b, k - 1, d), the last k - 1 valid inputs, oldest first, zeros before their document; None is zeros.
      segment_ids: (b, t) int, 0 is padding; None is one document, which `initial_state` precedes.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      backend: see pallas_kernels.dispatch.

    Returns:
      y (b, t, d) in x's dtype, 0 at padding; and the state after the last valid token, in `initial_state`'s dtype (x's without
      one), or None.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    _check_short(x, taps, bias, initial_state, segment_ids, initial_segment)
    run = choose("short_convolution", backend, {"xla": (xla.short_convolution, always), "reference": (reference.short_convolution, always)})
    return run(
        x,
        taps,
        bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
        return_state=return_state,
    )


def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: jax.Array | None = None, backend: str | None = None) -> jax.Array:
    """Convolves with a long filter, in fp32.

    Without segments a Fourier transform spreads rounding errors over the whole sequence (1e-7 of its size), earlier tokens
    included. With segments documents are convolved apart: neither the values of later tokens nor those of other documents change a bit.

    Args:
      x: (b, t, d).
      filter: (length, d), any length; taps past t are unused, taps it lacks are 0.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      backend: see pallas_kernels.dispatch.

    Returns:
      y (b, t, d) in x's dtype, 0 at padding.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    _check_array("long_convolution", x, segment_ids)
    if filter.ndim != 2 or filter.shape[0] < 1 or filter.shape[1] != x.shape[2]:
        raise ValueError(f"long_convolution: filter must be (length, {x.shape[2]}); got {filter.shape}")
    run = choose("long_convolution", backend, {"xla": (xla.long_convolution, always), "reference": (reference.long_convolution, always)})
    return run(x, filter, segment_ids=segment_ids)


def _check_array(operation: str, x, segment_ids) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"{operation}: x must be (b, t, d) with t at least 1; got {x.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"{operation}: segment_ids must be {x.shape[:2]}; got {segment_ids.shape}")


def _check_short(x, taps, bias, initial_state, segment_ids, initial_segment) -> None:
    _check_array("short_convolution", x, segment_ids)
    b, _, d = x.shape
    if taps.ndim != 2 or taps.shape[0] < 1 or taps.shape[1] != d:
        raise ValueError(f"short_convolution: taps must be (k, {d}); got {taps.shape}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"short_convolution: bias must be {(d,)}; got {bias.shape}")
    if initial_state is not None and initial_state.shape != (b, taps.shape[0] - 1, d):
        raise ValueError(f"short_convolution: initial_state must be {(b, taps.shape[0] - 1, d)}; got {initial_state.shape}")
    if initial_segment is not None and initial_segment.shape != (b,):
        raise ValueError(f"short_convolution: initial_segment must be {(b,)}; got {initial_segment.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("short_convolution: initial_state together with segment_ids needs initial_segment (b,)")


__all__ = ["long_convolution", "short_convolution"]
