"""HGRN2: forget gates per channel that also say how much is written; the keys are 1 - f.

    S_t = Diag(f_t) S_{t-1} + (1 - f_t) i_t^T,   o_t = S_t^T q_t   per head,   y = W_o norm(o)
    q = silu(W_q x),   i = W_i x,   f_t = lower + (1 - lower) sigmoid(W_f x_t)

Qin et al. 2024, equations 6 to 8; the norm is over all heads. Lower bounds grow from 0 in the first layer towards 1:
l / L in layer l of L at the start. The paper shares one table over layers (a cumulative softmax); here each layer
trains its own bounds from the same initial values, and the first layer's stays 0. Published: heads of 128 dimensions.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, LowerBound, in_fp32, merge_heads, split_heads
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class HGRN2(RecurrentConfig):
    """HGRN2.

    Attributes:
      kernel: taps of convolutions with SiLU of the three projections; None leaves them out.
      lower_bounds: whether forget gates have lower bounds.
    """

    kernel: int | None = chz.field(default=None, validator=has_taps)
    lower_bounds: bool = True

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> HGRN2Mixer:
        return self.in_each_direction(HGRN2Mixer, width, place, rngs)


class HGRN2Mixer(RecurrentMixer):
    """The module of `HGRN2`; the projection called `key` is that of the forget gates, `value` that of the inputs."""

    def __init__(self, config: HGRN2, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        _, h, k, v = self.sizes
        self.lower = LowerBound((h, k), "h k", place) if config.lower_bounds else None
        self.norm = HeadNormalization(h, v, "all")

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, f, v = (self.projected(name, x, stream) for name in ("query", "key", "value"))
        h = self.sizes.heads
        logits = in_fp32(split_heads(f, h))
        log_forget = jax.nn.log_sigmoid(logits) if self.lower is None else self.lower(logits)
        k = -jnp.expm1(log_forget)
        o = stream.recurrence(
            split_heads(jax.nn.silu(q), h), k.astype(v.dtype), split_heads(v, h), log_decay=log_forget
        )
        return self.output(merge_heads(self.norm(o)))
