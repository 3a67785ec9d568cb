"""Gated DeltaNet 2: erasing and writing have strengths of their own, per channel of the key and of the value.

    S'_t = Diag(a_t) S_{t-1},   S_t = S'_t + k_t (w_t * v_t - S'_t^T (b_t * k_t))^T,   o_t = S_t^T q_t / sqrt(k)
    b_t = sigmoid(W_b x_t) (h, k),   w_t = sigmoid(W_w x_t) (h, v),   decay, gate and the rest as Kimi Delta Attention

NVIDIA 2026, arXiv 2605.22791; initial values as in flash-linear-attention (gdn2.py). With `negative_eigenvalues` b is
in (0, 2). With b = w = beta it is Kimi Delta Attention.
"""

from __future__ import annotations

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import DeltaRuleConfig
from recollect.layers.mixers.kimi_delta_attention import KimiDeltaAttentionMixer
from recollect.layers.modules import Linear, in_fp32, split_heads


@chz.chz(typecheck=True)
class GatedDeltaNet2(DeltaRuleConfig):
    """Gated DeltaNet 2."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedDeltaNet2Mixer:
        return self.in_each_direction(GatedDeltaNet2Mixer, width, place, rngs)


class GatedDeltaNet2Mixer(KimiDeltaAttentionMixer):
    """The module of `GatedDeltaNet2`."""

    def __init__(self, config: GatedDeltaNet2, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        del self.strength
        _, h, k, v = self.sizes
        self.erase = Linear(width, h * k, "d hk", rngs)
        self.write = Linear(width, h * v, "d hv", rngs)

    def strengths(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t h v"], Float[Array, "b t h k"]]:
        erase, write = (
            jax.nn.sigmoid(in_fp32(split_heads(projection(x), self.sizes.heads)))
            for projection in (self.erase, self.write)
        )
        return write, 2 * erase if self.config.negative_eigenvalues else erase
