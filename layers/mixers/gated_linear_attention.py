"""Gated linear attention (GLA): each channel of the key decays by its own gate.

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(k)   per head
    log a_t = logsigmoid(W_2 W_1 x_t + bias) / 16,   y = W_o [norm(o) * silu(W_g x)]

Yang et al. 2023, equation 3 and section 4.4: 4 heads, keys half as wide as values, rank 16; no convolution.
"""

from __future__ import annotations

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import head_gate
from recollect.layers.modules import LogSigmoidDecay, LowRank
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class GatedLinearAttention(RecurrentConfig):
    """Gated linear attention.

    Attributes:
      key_dim: None: width // (2 heads).
      kernel: taps of convolutions with SiLU of queries, keys and values; None leaves them out.
      rank: of the decay's projection.
      temperature: by which log decays are divided.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    kernel: int | None = chz.field(default=None, validator=has_taps)
    rank: int = chz.field(default=16, validator=at_least(1))
    temperature: float = chz.field(default=16.0, validator=requires(lambda value: value > 0, "must be positive"))

    def sizes(self, width: int) -> HeadSizes:
        return super().sizes(width)._replace(key_dim=self.key_dim or max(1, self.share(width) // 2))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedLinearAttentionMixer:
        return self.in_each_direction(GatedLinearAttentionMixer, width, place, rngs)


class GatedLinearAttentionMixer(RecurrentMixer):
    """The module of `GatedLinearAttention`."""

    def __init__(self, config: GatedLinearAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        _, h, k, v = self.sizes
        projection = LowRank(width, config.rank, h * k, "hk", rngs, bias=True)
        self.decay = LogSigmoidDecay(projection, h, config.temperature)
        self.gate = head_gate(width, h, v, rngs)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        o = stream.recurrence(q, k, v, log_decay=self.decay(x), scale=k.shape[3] ** -0.5)
        return self.output(self.gate(o, x))
