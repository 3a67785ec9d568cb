"""Mamba: a selective state space model per channel.

    h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t,   y_t = C_t . h_t + D u_t      per channel, h in R^state
    u = silu(conv(W_u x)),   dt = softplus(W_2 W_1 u + step_bias),   B, C = W_B u, W_C u,   A = -exp(log_rate)
    out = W_o (y * silu(W_z x))

Gu & Dao 2023, algorithm 2 and figure 3; B and C are shared by all channels. As published: twice as many channels as the
model is wide, W_1 to width / 16 dimensions, the convolution has a bias, A_n starts at -n, steps log-uniform on (0.001,
0.1), D at 1, W_2 uniform on +-1/sqrt(rank), other projections as torch's. State: `state` fp32 numbers per channel, and
the last kernel - 1 inputs of the convolution.
"""

from __future__ import annotations

import math

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import Linear, in_fp32, inverse_softplus, parameter, spread_uniform, torch_uniform
from recollect.layers.modules.initial_values import uniform
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.recurrent import Stream, StreamMixer
from recollect.pallas_kernels.selective_scan import selective_scan


@chz.chz(typecheck=True)
class Mamba(DirectedConfig):
    """Mamba.

    Attributes:
      state: dimensions of the state per channel.
      expansion: channels in model widths.
      rank: dimensions that steps are mapped through; None: width / 16, rounded up.
      kernel: taps of the convolution.
    """

    state: int = chz.field(default=16, validator=at_least(1))
    expansion: int = chz.field(default=2, validator=at_least(1))
    rank: int | None = chz.field(default=None, validator=at_least(1))
    kernel: int = chz.field(default=4, validator=has_taps)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MambaMixer:
        return self.in_each_direction(MambaMixer, width, place, rngs)


class MambaMixer(StreamMixer):
    """The module of `Mamba`."""

    def __init__(self, config: Mamba, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        f, n, rank = config.expansion * width, config.state, config.rank or -(-width // 16)
        self.input, self.gate = (Linear(width, f, "d f", rngs, init=torch_uniform()) for _ in range(2))
        self.convolution = CausalConvolution(f, config.kernel, rngs, bias=True)
        self.step_down = Linear(f, rank, "f u", rngs, init=torch_uniform())
        self.step_up = Linear(rank, f, "u f", rngs, init=uniform(rank**-0.5))
        step = jnp.exp(spread_uniform(rngs.params(), (f,), math.log(1e-3), math.log(0.1)))
        self.step_bias = parameter(inverse_softplus(step), "f", decay=False)
        self.write, self.read = (Linear(f, n, "f k", rngs, init=torch_uniform()) for _ in range(2))
        self.log_rate = parameter(jnp.broadcast_to(jnp.log(jnp.arange(1.0, n + 1)), (f, n)), "f k", decay=False)
        self.skip = parameter(jnp.ones(f), "f", decay=False)
        self.output = Linear(f, width, "f d", rngs, init=torch_uniform(place.depth**-0.5))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        u = stream.convolution(self.convolution, self.input(x), name="inputs", activation="silu")
        step = jax.nn.softplus(in_fp32(self.step_up(self.step_down(u))) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_rate[...].astype(step.dtype))
        zeros = jax.ShapeDtypeStruct((x.shape[0], *log_decay.shape), jnp.float32)
        inputs = (in_fp32(u), step, log_decay, self.write(u), self.read(u))
        y = stream.run("memory", zeros, selective_scan, *inputs) + self.skip[...] * u
        return self.output((y * jax.nn.silu(self.gate(x))).astype(x.dtype))
