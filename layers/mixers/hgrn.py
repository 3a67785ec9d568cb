"""HGRN: a gated recurrence per channel, whose forget gates have lower bounds that grow with depth.

    h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t),   f_t = lower + (1 - lower) sigmoid(W_f x_t)       per channel
    y = W_o [norm(h) * silu(W_g x)]

Qin et al. 2023, equations 1 to 5, with the real state of HGRN2's authors' later code; lower bounds as in `HGRN2`: l / L
in layer l of L at the start, trained by each layer for itself. State: one fp32 number per channel.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, LowerBound, OutputGate, in_fp32, output_init
from recollect.layers.recurrent import Stream, StreamMixer


@chz.chz(typecheck=True)
class HGRN(DirectedConfig):
    """HGRN.

    Attributes:
      lower_bounds: whether forget gates have lower bounds.
    """

    lower_bounds: bool = True

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> HGRNMixer:
        return self.in_each_direction(HGRNMixer, width, place, rngs)


class HGRNMixer(StreamMixer):
    """The module of `HGRN`."""

    def __init__(self, config: HGRN, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        self.input, self.forget = (Linear(width, width, "d f", rngs) for _ in range(2))
        self.lower = LowerBound((width,), "f", place) if config.lower_bounds else None
        self.gate = OutputGate(Linear(width, width, "d f", rngs), norm=HeadNormalization(1, width))
        self.output = Linear(width, width, "f d", rngs, init=output_init(place.depth))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        logits = in_fp32(self.forget(x))
        log_forget = jax.nn.log_sigmoid(logits) if self.lower is None else self.lower(logits)
        h = stream.scan(jnp.exp(log_forget), -jnp.expm1(log_forget) * jax.nn.silu(in_fp32(self.input(x))))
        return self.output(self.gate(h[:, :, None], x))
