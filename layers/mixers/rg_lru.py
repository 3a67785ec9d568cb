"""The recurrent block of Griffin, around the real-gated linear recurrent unit (RG-LRU).

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t),   log a_t = -8 softplus(L) r_t        per channel
    r_t = sigmoid(W_r u_t + b_r),   i_t = sigmoid(W_i u_t + b_i),   u = conv(W_u x + b_u)
    y = W_o (gelu(W_g x + b_g) * h) + b_o

De et al. 2024, section 2.4 and equations 1 to 4; the authors' code (recurrentgemma) for the rest: W_r and W_i are block
diagonal, a block per head; at the first token of a document the root is 1; exp(-softplus(L)) starts as the root of a
number uniform on (0.9^2, 0.999^2). State: one fp32 number per channel, and kernel - 1 inputs of the convolution.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import BlockDiagonal, Linear, in_fp32, output_init, parameter, spread_uniform
from recollect.layers.modules.decays import inverse_softplus
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.packing import token_positions
from recollect.layers.recurrent import Stream, StreamMixer


@chz.chz(typecheck=True)
class RGLRU(DirectedConfig):
    """Griffin's recurrent block.

    Attributes:
      heads: blocks of the gates' matrices.
      channels: of the recurrence; None: the model width.
      kernel: taps of the convolution.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    channels: int | None = chz.field(default=None, validator=at_least(1))
    kernel: int = chz.field(default=4, validator=has_taps)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> RGLRUMixer:
        channels = self.channels or width
        if channels % self.heads:
            raise UserError(f"heads={self.heads} does not divide the {channels} channels of the recurrence")
        return self.in_each_direction(RGLRUMixer, width, place, rngs)


class RGLRUMixer(StreamMixer):
    """The module of `RGLRU`."""

    def __init__(self, config: RGLRU, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        n = config.channels or width
        self.input = Linear(width, n, "d f", rngs, bias=True)
        self.gate = Linear(width, n, "d f", rngs, bias=True)
        self.convolution = CausalConvolution(n, config.kernel, rngs, bias=True)
        self.gates = nnx.Dict({name: BlockDiagonal(n, config.heads, rngs) for name in ("input", "recurrence")})
        radius = jnp.sqrt(spread_uniform(rngs.params(), (n,), 0.9**2, 0.999**2))
        self.rate = parameter(inverse_softplus(-jnp.log(radius)), "f", decay=False)
        self.output = Linear(n, width, "f d", rngs, bias=True, init=output_init(place.depth))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        u = in_fp32(stream.convolution(self.convolution, self.input(x), name="inputs"))
        log_a = -8 * jax.nn.softplus(self.rate[...].astype(u.dtype)) * jax.nn.sigmoid(self.gates["recurrence"](u))
        starts = (token_positions(stream.context, *x.shape[:2]) == 0)[..., None]
        root = jnp.sqrt(jnp.where(starts, 1, -jnp.expm1(2 * log_a)))  # 1 - a^2, exact where a is close to 1
        h = stream.scan(jnp.exp(log_a), root * jax.nn.sigmoid(self.gates["input"](u)) * u)
        return self.output(jax.nn.gelu(self.gate(x)) * h.astype(x.dtype))
