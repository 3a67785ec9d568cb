"""Causal depthwise convolutions, what gated-convolution layers are made of:

    short:  y_i = out_gate_i * activation(bias + sum_{j < k} taps[j] u_{i-j}),   u = in_gate * x
            a few taps, streamed through a state of k - 1 inputs u
    long:   y_i = out_gate_i * (skip u_i + sum_{j <= i} filter[i-j] u_j),        u = in_gate * x
            a filter as long as the input

Each channel by itself; tap j multiplies the input j tokens back, so taps[0] is the current token's (torch's Conv1d
stores them the other way round). With segments, i - j counts the valid tokens between two tokens of one document: taps
never cross documents, and padding (segment 0), wherever it stands, takes no part and reads 0.

What published layers pass:

| layer | call |
|---|---|
| Based's gated convolution (Arora et al. 2024) | short: x = u1, out_gate = u2, activation = "silu" |
| BaseConv (Arora et al. 2024, Zoology, equation 3) | short: x = u, out_gate = the projection W u + b' |
| H3's shift and gate (Fu et al. 2023, section 3) | short: x = k, out_gate = v |
| Hyena of order 2 (Poli et al. 2023, section 3) | short: x = v, out_gate = x1; then long: out_gate = x2, skip = D |
| Mamba-2, Gated DeltaNet (their convolutions) | short: activation = "silu" |
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax

from recollect.pallas_kernels.dispatch import choose
from recollect.pallas_kernels.gated_convolution import long, sequence_parallel, xla
from recollect.pallas_kernels.sharding import sequence_parts

SHORT_BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.gated_convolution.gpu",
    "pallas_tpu": "recollect.pallas_kernels.gated_convolution.tpu",
    "xla": "recollect.pallas_kernels.gated_convolution.xla",
    "reference": "recollect.pallas_kernels.gated_convolution.reference",
}
LONG_BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.gated_convolution.gpu_long",
    "pallas_tpu": "recollect.pallas_kernels.gated_convolution.tpu_long",
    "xla": "recollect.pallas_kernels.gated_convolution.xla",
    "reference": "recollect.pallas_kernels.gated_convolution.reference",
}

Activation = Literal["none", "silu"]

# Letters of the arrays' dimensions, by which a mesh splits them: channels go by the letter of heads.
SHORT_DIMENSIONS = {
    "x": "b t h",
    "taps": "k h",
    "bias": "h",
    "in_gate": "b t h",
    "out_gate": "b t h",
    "initial_state": "b s h",
    "segment_ids": "b t",
    "initial_segment": "b",
}
LONG_DIMENSIONS = {"x": "b t h", "filter": "k h"}

# Kernels take blocks of 64 (GPU) and 128 (TPU) tokens: with fewer than half of the smaller, as when generating, xla's
# fused sum comes first.
_KERNELS_FROM = 32


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None = None,
    *,
    in_gate: jax.Array | None = None,
    out_gate: jax.Array | None = None,
    activation: Activation = "none",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
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
    _check_short(x, taps, bias, in_gate, out_gate, activation, initial_state, segment_ids, initial_segment)
    if sequence_parts(x.shape[1]) > 1 and initial_state is None and not return_state:
        arrays = {
            "x": x,
            "taps": taps,
            "bias": bias,
            "in_gate": in_gate,
            "out_gate": out_gate,
            "segment_ids": segment_ids,
        }
        part: Any = functools.partial(short_convolution, activation=activation, backend=backend)
        return sequence_parallel.short_over_devices(part, arrays, SHORT_DIMENSIONS), None
    backends = SHORT_BACKENDS
    if x.shape[1] < _KERNELS_FROM:
        backends = {"xla": backends["xla"], **backends}
    settings = {
        "in_gate": in_gate,
        "out_gate": out_gate,
        "activation": activation,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
        "initial_segment": initial_segment,
        "return_state": return_state,
    }
    run = choose("short_convolution", backend, backends, x, taps, bias, **settings)
    return run(x, taps, bias, **settings)


def short_convolution_step(
    state: jax.Array,
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array | None = None,
    *,
    in_gate: jax.Array | None = None,
    out_gate: jax.Array | None = None,
    activation: Activation = "none",
) -> tuple[jax.Array, jax.Array]:
    """One token of `short_convolution`, O(k d) a row.

    Args:
      state: (b, k - 1, d), as `short_convolution` returns it; zeros start a document.
      x: (b, d).
      taps, bias: as there.
      in_gate, out_gate: (b, d) or None.
      activation: as there.

    Returns:
      y (b, d) in x's dtype, and the state after it, in `state`'s dtype.

    Raises:
      ValueError: an argument's shape does not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"short_convolution_step: x must be (b, d); got {x.shape}")
    in_gate, out_gate = (None if gate is None else gate[:, None] for gate in (in_gate, out_gate))
    _check_short(x[:, None], taps, bias, in_gate, out_gate, activation, state, None, None)
    y, after = xla.short_convolution(
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


def long_convolution(
    x: jax.Array,
    filter: jax.Array,
    *,
    in_gate: jax.Array | None = None,
    out_gate: jax.Array | None = None,
    skip: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Convolves with a long filter: out_gate * (skip u + filter * u), u = in_gate * x; sums in fp32.

    A Fourier transform (xla's, beyond a length that depends on the platform) spreads rounding errors over the whole
    sequence (1e-7 of its size), earlier tokens included. With segments documents are convolved apart: neither the
    values of later tokens nor those of other documents change a bit. The kernels multiply blocked Toeplitz matrices, in
    x's dtype: causal to the bit.

    Args:
      x: (b, t, d).
      filter: (length, d), any length; taps past t are unused, taps it lacks are 0.
      in_gate: (b, t, d), multiplies the inputs; None is 1.
      out_gate: (b, t, d), multiplies the outputs; None is 1.
      skip: (d,), the weight of the input in the output, kept out of the filter so that its size costs the taps no
        precision.
      segment_ids: (b, t) int, 0 is padding; None is one document.
      backend: see recollect.pallas_kernels.dispatch.

    Returns:
      y (b, t, d) in x's dtype, 0 at padding.

    Raises:
      ValueError: an argument's shape does not fit, or `backend` cannot serve the call.
    """
    _check_array("long_convolution", x, segment_ids, in_gate, out_gate)
    d = x.shape[2]
    if filter.ndim != 2 or filter.shape[0] < 1 or filter.shape[1] != d:
        raise ValueError(f"long_convolution: filter must be (length, {d}); got {filter.shape}")
    if skip is not None and skip.shape != (d,):
        raise ValueError(f"long_convolution: skip must be {(d,)}; got {skip.shape}")

    def convolve(u, filter, *, segment_ids, dtype) -> jax.Array:
        run = choose(
            "long_convolution",
            backend,
            LONG_BACKENDS,
            jax.ShapeDtypeStruct(u.shape, dtype),
            filter,
            segment_ids=segment_ids,
        )
        return run(u, filter, segment_ids=segment_ids, dtype=dtype)

    def over_devices(u, filter, *, segment_ids, dtype) -> jax.Array:
        return sequence_parallel.long_over_devices(
            lambda *part: convolve(part[0], part[1], segment_ids=part[2], dtype=dtype), u, filter, segment_ids
        )

    run = over_devices if sequence_parts(x.shape[1]) > 1 else convolve
    return long.gated(run, x, filter, in_gate, out_gate, skip, segment_ids)


def _check_array(operation: str, x, segment_ids, in_gate, out_gate) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"{operation}: x must be (b, t, d) with t at least 1; got {x.shape}")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"{operation}: segment_ids must be {x.shape[:2]}; got {segment_ids.shape}")
    for name, gate in (("in_gate", in_gate), ("out_gate", out_gate)):
        if gate is not None and gate.shape != x.shape:
            raise ValueError(f"{operation}: {name} must have x's shape {x.shape}; got {gate.shape}")


def _check_short(x, taps, bias, in_gate, out_gate, activation, initial_state, segment_ids, initial_segment) -> None:
    _check_array("short_convolution", x, segment_ids, in_gate, out_gate)
    b, _, d = x.shape
    if taps.ndim != 2 or taps.shape[0] < 1 or taps.shape[1] != d:
        raise ValueError(f"short_convolution: taps must be (k, {d}); got {taps.shape}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"short_convolution: bias must be {(d,)}; got {bias.shape}")
    if activation not in get_args(Activation):
        raise ValueError(
            f"short_convolution: activation={activation!r} must be one of {', '.join(get_args(Activation))}"
        )
    if initial_state is not None and initial_state.shape != (b, taps.shape[0] - 1, d):
        raise ValueError(
            f"short_convolution: initial_state must be {(b, taps.shape[0] - 1, d)}; got {initial_state.shape}"
        )
    if initial_segment is not None and initial_segment.shape != (b,):
        raise ValueError(f"short_convolution: initial_segment must be {(b,)}; got {initial_segment.shape}")
    if segment_ids is not None and initial_state is not None and initial_segment is None:
        raise ValueError("short_convolution: initial_state together with segment_ids needs initial_segment (b,)")


__all__ = ["Activation", "long_convolution", "short_convolution", "short_convolution_step"]
