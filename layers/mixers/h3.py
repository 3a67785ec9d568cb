"""H3: keys that remember the last few, multiplied with values into a diagonal state space model that queries read.

    k'_t = sum_{j < taps} c_j k_{t-j} + D_k k_t                                             (the shift model)
    S_t = pole S_{t-1} + k'_t v_t^T,   o_t = (Re(residue S_t) + D k'_t v_t^T)^T q_t         per head, modes summed
    y = W_o o + b_o,   q, k, v = W x + b

Fu et al. 2022, "Hungry hungry hippos"; HazyResearch/zoology's code for the rest: taps as many as state dimensions,
started as torch's Conv1d, the state space model as S4D-Lin by the bilinear rule, D_k and D ~ N(0, 1), projections
N(0, 0.02). What the shift model shifts in and
what the diagonal one takes in, trained there too, are constants 1. State: state x head_dim^2 numbers per head, and the
last taps - 1 keys.
"""

from __future__ import annotations

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.mixers.s4d import are_pairs
from recollect.layers.modules import (
    DiagonalStateSpace,
    Linear,
    in_fp32,
    merge_heads,
    normal,
    parameter,
    split_heads,
)
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.recurrent import Stream, StreamMixer


@chz.chz(typecheck=True)
class H3(DirectedConfig):
    """H3.

    Attributes:
      head_dim: dimensions per head: key and value are multiplied in all pairs of them.
      state: real dimensions of the diagonal model's state, per head and pair.
      taps: keys that the shift model sees, the current token's included; None: state.
    """

    head_dim: int = chz.field(default=1, validator=at_least(1))
    state: int = chz.field(default=64, validator=are_pairs)
    taps: int | None = chz.field(default=None, validator=has_taps)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> H3Mixer:
        if width % self.head_dim:
            raise UserError(f"head_dim={self.head_dim} does not divide the model width {width}")
        return self.in_each_direction(H3Mixer, width, place, rngs)


class H3Mixer(StreamMixer):
    """The module of `H3`."""

    def __init__(self, config: H3, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        self.heads = width // config.head_dim
        self.query, self.key, self.value = (Linear(width, width, "d hk", rngs, bias=True) for _ in range(3))
        self.shift = CausalConvolution(width, config.taps or config.state, rngs)
        self.shift_skip = parameter(normal(1.0)(rngs.params(), (width,)), "f", decay=False)
        self.space = DiagonalStateSpace(self.heads, config.state, rngs, rule="bilinear")
        self.skip = parameter(normal(1.0)(rngs.params(), (self.heads,)), "h", decay=False)
        self.output = Linear(width, width, "hv d", rngs, bias=True)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        k = self.key(x)
        k = stream.convolution(self.shift, k, name="keys") + (self.shift_skip[...] * k).astype(k.dtype)
        q, k, v = (in_fp32(split_heads(y, self.heads)) for y in (self.query(x), k, self.value(x)))
        o = stream.modes(v, *self.space(v.dtype), q=q, k=k)
        o = o + self.skip[...][:, None] * jnp.sum(q * k, axis=-1, keepdims=True) * v
        return self.output(merge_heads(o).astype(x.dtype))
