"""minGRU: a GRU whose gate and candidate see the input alone, so that it is a scan.

    h_t = (1 - z_t) h_{t-1} + z_t W_h x_t,   z_t = sigmoid(W_z x_t + b),   y = W_o h       per channel

Feng et al. 2024, section 3.1. State: one fp32 number per channel.
"""

from __future__ import annotations

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import requires
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import Linear, in_fp32, output_init
from recollect.layers.recurrent import Stream, StreamMixer


@chz.chz(typecheck=True)
class MinGRU(DirectedConfig):
    """minGRU.

    Attributes:
      expansion: channels of the recurrence in model widths.
    """

    expansion: float = chz.field(default=1.0, validator=requires(lambda value: value > 0, "must be positive"))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MinGRUMixer:
        return self.in_each_direction(MinGRUMixer, width, place, rngs)


class MinGRUMixer(StreamMixer):
    """The module of `MinGRU`."""

    def __init__(self, config: MinGRU, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        n = max(1, round(config.expansion * width))
        self.update = Linear(width, n, "d f", rngs, bias=True)
        self.candidate = Linear(width, n, "d f", rngs)
        self.output = Linear(n, width, "f d", rngs, init=output_init(place.depth))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        logits = in_fp32(self.update(x))
        h = stream.scan(jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits) * in_fp32(self.candidate(x)))
        return self.output(h.astype(x.dtype))
