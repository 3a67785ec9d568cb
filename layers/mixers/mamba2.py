"""Mamba-2: a state space model with one decay per head and token.

    S_t = a_t S_{t-1} + dt_t B_t x_t^T,   y_t = S_t^T C_t + D x_t   per head
    x, B, C = silu(conv(W u)),   dt = softplus(W_dt u + step_bias),   log a_t = -exp(log_rate) dt_t
    out = W_o norm(y * silu(W_z u))

Dao & Gu 2024, equation 16 and section 7: B and C (keys and queries) are shared by the heads of a group, x are the
values, the norm is over all heads. As published: width of x twice the model's, one group, the convolution
has a bias, rates start uniform on (1, 16) and steps log-uniform on (0.001, 0.1), D at 1; projections as torch's.
"""

from __future__ import annotations

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, OutputGate, Skip, StepDecay, torch_uniform
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class Mamba2(RecurrentConfig):
    """Mamba-2.

    Attributes:
      key_heads: groups, each with its B and C.
      key_dim: state dimensions, those of B and C.
      value_dim: dimensions of x per head; None: 2 width // heads.
      kernel: taps of the convolution.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    key_heads: int = chz.field(default=1, validator=at_least(1))
    key_dim: int = chz.field(default=64, validator=at_least(1))
    kernel: int = chz.field(default=4, validator=has_taps)

    def sizes(self, width: int) -> HeadSizes:
        return super().sizes(width)._replace(value_dim=self.value_dim or 2 * self.share(width))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> Mamba2Mixer:
        return self.in_each_direction(Mamba2Mixer, width, place, rngs)


class Mamba2Mixer(RecurrentMixer):
    """The module of `Mamba2`."""

    def __init__(self, config: Mamba2, width: int, place: Place, rngs: nnx.Rngs):
        inits = dict.fromkeys(("query", "key", "value"), torch_uniform())
        inits["output"] = torch_uniform(place.depth**-0.5)
        sizes = config.sizes(width)
        super().__init__(config, width, place, rngs, sizes, kernel=config.kernel, convolution_bias=True, inits=inits)
        _, h, _, v = sizes
        self.decay = StepDecay(h, rngs, Linear(width, h, "d h", rngs, init=torch_uniform()), rates=(1.0, 16.0))
        self.skip = Skip(h)
        projection = Linear(width, h * v, "d hv", rngs, init=torch_uniform())
        self.gate = OutputGate(projection, norm=HeadNormalization(h, v, "all"), gate_first=True)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        log_decay, step = self.decay(x)
        o = self.recurrence(x, stream, q=q, k=k, v=v, log_decay=log_decay, write_strength=step)
        return self.output(self.gate(self.skip(o, v), x))
