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

import jax
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.dispatch import choose, sequence_parts
from recollect.pallas_kernels.gated_convolution import long, sequence_parallel
from recollect.pallas_kernels.gated_convolution.sequence_parallel import SHORT_DIMENSIONS
from recollect.pallas_kernels.gated_convolution.short import Activation, check_array, short_convolution
from recollect.pallas_kernels.gated_convolution.short_step import short_convolution_step

LONG_BACKENDS = {
    "pallas_gpu": "recollect.pallas_kernels.gated_convolution.gpu_long",
    "pallas_tpu": "recollect.pallas_kernels.gated_convolution.tpu_long",
    "xla": "recollect.pallas_kernels.gated_convolution.xla",
    "reference": "recollect.pallas_kernels.gated_convolution.reference",
}

# Letters of the arrays' dimensions, by which a mesh splits them: channels go by the letter of heads.
LONG_DIMENSIONS = {"x": "b t h", "filter": "k h"}


def long_convolution(
    x: Float[Array, "b t d"],
    filter: Float[Array, "length d"],
    *,
    in_gate: Float[Array, "b t d"] | None = None,
    out_gate: Float[Array, "b t d"] | None = None,
    skip: Float[Array, " d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    backend: str | None = None,
) -> Float[Array, "b t d"]:
    """Convolves with a long filter: out_gate * (skip u + filter * u), u = in_gate * x; sums in fp32.

    A Fourier transform (xla's, beyond a length that depends on the platform) spreads rounding errors over the whole
    sequence (1e-7 of its size), earlier tokens included. With segments documents are convolved separately: neither the
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
    check_array("long_convolution", x, segment_ids, in_gate, out_gate)
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


__all__ = ["SHORT_DIMENSIONS", "Activation", "long_convolution", "short_convolution", "short_convolution_step"]
