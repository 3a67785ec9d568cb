"""S4D: a diagonal state space model per channel, the same at every token.

    x_t = exp(dt A) x_{t-1} + u_t,   y_t = 2 Re(C' x_t) + D u_t        per channel, x in C^(state / 2), A diagonal
    out = (W_1 z + b_1) * sigmoid(W_2 z + b_2),   z = gelu(y)

Gu, Gupta, Goel & Re 2022, equations 2 to 4 and section 4.1; C' and first values of A, C and dt: `DiagonalStateSpace`.
D ~ N(0, 1), projections as torch's: the authors' code. State: `state` fp32 numbers per channel.
"""

from __future__ import annotations

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import requires
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import DiagonalStateSpace, Linear, in_fp32, normal, parameter, torch_uniform
from recollect.layers.modules.initial_values import uniform
from recollect.layers.modules.state_space import Frequencies
from recollect.layers.recurrent import Stream, StreamMixer

are_pairs = requires(lambda state: state >= 2 and state % 2 == 0, "must be even and at least 2: conjugate pairs")
"""Validator of the dimensions of complex states."""


@chz.chz(typecheck=True)
class S4D(DirectedConfig):
    """S4D.

    Attributes:
      state: real dimensions of the state per channel: half as many complex modes.
      frequencies: of the modes at the start, S4D-Lin's or S4D-Inv's.
    """

    state: int = chz.field(default=64, validator=are_pairs)
    frequencies: Frequencies = "linear"

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> S4DMixer:
        return self.in_each_direction(S4DMixer, width, place, rngs)


class S4DMixer(StreamMixer):
    """The module of `S4D`."""

    def __init__(self, config: S4D, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        self.space = DiagonalStateSpace(width, config.state, rngs, frequencies=config.frequencies)
        self.skip = parameter(normal(1.0)(rngs.params(), (width,)), "f", decay=False)
        self.output, self.gate = (Linear(width, width, "f d", rngs, bias=True, init=torch_uniform()) for _ in range(2))
        for projection in (self.output, self.gate):
            projection.bias = parameter(uniform(width**-0.5)(rngs.params(), (width,)), "d")

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        u = in_fp32(x)
        y = stream.modes(u[..., None], *self.space(u.dtype))[..., 0] + self.skip[...] * u
        z = jax.nn.gelu(y, approximate=False).astype(x.dtype)
        return self.output(z) * jax.nn.sigmoid(self.gate(z))
