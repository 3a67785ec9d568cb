"""Kimi Delta Attention (KDA): the delta rule on a state whose key channels decay each at its own rate.

    S'_t = Diag(a_t) S_{t-1},   S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T,   o_t = S_t^T q_t / sqrt(k)   per head
    log a_t = -exp(log_rate_h) softplus(W_2 W_1 x_t + step_bias),   y = W_o [norm(o) * sigmoid(W_4 W_3 x + bias)]

With `bound` log a_t = -bound sigmoid(exp(log_rate_h) (W_2 W_1 x_t + step_bias)), with rates from 1 on: as published, 5.
Kimi team 2025, "Kimi Linear", equation 1 and section 4; queries, keys, values and beta as DeltaNet's. Rates per head
start uniform on (1, 16), steps per channel log-uniform on (0.001, 0.1). Published: 128 dimensions per head.
"""

from __future__ import annotations

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import requires
from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import DeltaRuleConfig, DeltaRuleMixer
from recollect.layers.modules import BoundedDecay, HeadNormalization, LowRank, OutputGate, StepDecay


@chz.chz(typecheck=True)
class KimiDeltaAttention(DeltaRuleConfig):
    """Kimi Delta Attention. The two low ranks are a head's value dimensions, as published.

    Attributes:
      gate_bias: whether the output gate has a bias; the published model's has none.
      bound: of a token's log decay, from below by -bound; None: there is none.
    """

    gate_bias: bool = True
    bound: float | None = chz.field(default=None, validator=requires(lambda b: b is None or b > 0, "must be positive"))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> KimiDeltaAttentionMixer:
        return self.in_each_direction(KimiDeltaAttentionMixer, width, place, rngs, gate_bias=self.gate_bias)


class KimiDeltaAttentionMixer(DeltaRuleMixer):
    """The module of `KimiDeltaAttention`; the base of Gated DeltaNet 2's."""

    def __init__(self, config: DeltaRuleConfig, width: int, place: Place, rngs: nnx.Rngs, *, gate_bias: bool = True):
        super().__init__(config, width, place, rngs)
        _, h, k, v = self.sizes
        low_rank, bound = LowRank(width, v, h * k, "hk", rngs), getattr(config, "bound", None)
        self.decay: StepDecay = (
            StepDecay(h, rngs, low_rank, rates=(1.0, 16.0), channels=k)
            if bound is None
            else BoundedDecay(h, rngs, low_rank, bound=bound, channels=k)
        )
        projection = LowRank(width, v, h * v, "hv", rngs, bias=gate_bias)
        self.gate = OutputGate(projection, activation="sigmoid", norm=HeadNormalization(h, v))

    def log_decay(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h k"]:
        return self.decay(x)[0]
