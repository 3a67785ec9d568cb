"""Short causal depthwise convolutions: a few taps, streamed through a state of the last inputs. The equation stands in
the package's docstring."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.gated_convolution import sequence_parallel

SHORT_BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.gated_convolution.gpu",
    "pallas_tpu": "recollect.pallas_kernels.gated_convolution.tpu",
    "xla": "recollect.pallas_kernels.gated_convolution.short_xla",
    "reference": "recollect.pallas_kernels.gated_convolution.reference",
}

Activation = Literal["none", "silu"]

# Kernels take blocks of 64 (GPU) and 128 (TPU) tokens: with fewer than half of the smaller, as when generating, xla's
# fused sum comes first.
_KERNELS_FROM = 32


def short_convolution(
    x: Float[Array, "b t d"],
    taps: Float[Array, "k d"],
    bias: Float[Array, " d"] | None = None,
    *,
    in_gate: Float[Array, "b t d"] | None = None,
    out_gate: Float[Array, "b t d"] | None = None,
    activation: Activation = "none",
    initial_state: Float[Array, "b k-1 d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b k-1 d"] | None]:
    """Convolves with a few taps: out_gate * activation(bias + sum_j taps[j] (in_gate * x)_{i-j}), all in fp32, rounded
    once.

    Args:
      x: (b, t, d).
      taps: (k, d); taps[0] multiplies the current token.
      bias: (d,) or None.
      in_gate: (b, t, d), multiplies the inputs; None is 1.
      out_gate: (b, t, d), multiplies the activated outputs; None is 1.
      activation: "none" or "silu".
      initial_state: (b, k - 1, d), the last k - 1 valid inputs in_gate * x, oldest first, zeros before their document;
        None is zeros.
      segment_ids: (b, t) int, 0 is padding; None is one document, which `initial_state` precedes.
      initial_segment: (b,) segment that `initial_state` belongs to; needed when both it and `segment_ids` are given.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      y (b, t, d) in x's dtype, 0 at padding; and the state after the last valid token, in `initial_state`'s dtype (x's
      without one), or None.

    Raises:
      ValueError: an argument's shape does not fit, or `backend` cannot serve the call.
    """
    check_short(x, taps, bias, in_gate, out_gate, activation, initial_state, segment_ids, initial_segment)
    settings = {
        "in_gate": in_gate,
        "out_gate": out_gate,
        "activation": activation,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "initial_segment": initial_segment,
        "return_state": return_state,
    }
    if sequence_parts(x.shape[1]) > 1 and initial_state is None and not return_state:
        arrays = {"x": x, "taps": taps, "bias": bias}
        arrays |= {"in_gate": in_gate, "out_gate": out_gate, "segment_ids": segment_ids}
        part: Any = functools.partial(short_convolution, activation=activation, backend=backend)
        return sequence_parallel.short_over_devices(part, arrays), None
    few = x.shape[1] < _KERNELS_FROM
    backends = {"xla": SHORT_BACKENDS["xla"], **SHORT_BACKENDS} if few else SHORT_BACKENDS
    run = choose("short_convolution", backend, backends, x, taps, bias, **settings)
    return run(x, taps, bias, **settings)


def check_array(operation: str, x: jax.Array, segment_ids: Any, in_gate: Any, out_gate: Any) -> None:
    """Checks what both convolutions take: x (b, t, d), segment ids and gates; raises ValueError."""
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"{operation}: x must be (b, t, d) with t at least 1; got {x.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"{operation}: segment_ids must be {x.shape[:2]}; got {segment_ids.shape}")
    for name, gate in (("in_gate", in_gate), ("out_gate", out_gate)):
        if gate is not None and gate.shape != x.shape:
            raise ValueError(f"{operation}: {name} must have x's shape {x.shape}; got {gate.shape}")


def check_short(x, taps, bias, in_gate, out_gate, activation, initial_state, segment_ids, initial_segment) -> None:
    """Checks the arguments of a short convolution; raises ValueError."""
    check_array("short_convolution", x, segment_ids, in_gate, out_gate)
    b, _, d = x.shape
    if taps.ndim != 2 or taps.shape[0] < 1 or taps.shape[1] != d:
        raise ValueError(f"short_convolution: taps must be (k, {d}); got {taps.shape}")
    if activation not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"short_convolution: activation={activation!r} must be one of {known}")
    state, segment = (initial_state, (b, taps.shape[0] - 1, d)), (initial_segment, (b,))
    shapes = {"bias": (bias, (d,)), "initial_state": state, "initial_segment": segment}
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"short_convolution: {name} must be {shape}; got {array.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("short_convolution: initial_state together with segment_ids needs initial_segment (b,)")
