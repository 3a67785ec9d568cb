"""Gated DeltaNet: the delta rule on a state that decays.

    S'_t = a_t S_{t-1},   S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T,   o_t = S_t^T q_t / sqrt(k)   per head
    log a_t = -exp(log_rate) softplus(W_a x_t + step_bias),   y = W_o [norm(o) * silu(W_g x)],   the rest as DeltaNet

Yang, Kautz & Hatamizadeh 2024, equation 10 and figure 1. Rates start uniform on (0, 16), steps log-uniform on (0.001,
0.1). Published sizes: keys of 256 dimensions in heads that together make 3/4 of the width, values twice as wide.
"""

from __future__ import annotations

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import DeltaRuleConfig, DeltaRuleMixer, head_gate
from recollect.layers.modules import Linear, StepDecay


@chz.chz(typecheck=True)
class GatedDeltaNet(DeltaRuleConfig):
    """Gated DeltaNet.

    Attributes:
      norm_epsilon: of the outputs' norm.
    """

    norm_epsilon: float = 1e-5

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedDeltaNetMixer:
        return self.in_each_direction(GatedDeltaNetMixer, width, place, rngs, norm_epsilon=self.norm_epsilon)


class GatedDeltaNetMixer(DeltaRuleMixer):
    """The module of `GatedDeltaNet`."""

    def __init__(
        self, config: DeltaRuleConfig, width: int, place: Place, rngs: nnx.Rngs, *, norm_epsilon: float = 1e-5
    ):
        super().__init__(config, width, place, rngs)
        _, h, _, v = self.sizes
        self.decay = StepDecay(h, rngs, Linear(width, h, "d h", rngs), rates=(0.0, 16.0))
        self.gate = head_gate(width, h, v, rngs, norm_epsilon)

    def log_decay(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h"] | None:
        return self.decay(x)[0]
