"""Gated attention: softmax attention whose output passes a gate of the mixer's input before the last projection.

    y = [o_1 * g_1 ... o_h * g_h] W_o,   g = sigmoid(x W_g)   per channel of each head, or one number per head

Qiu et al. 2025 (2505.06708), equation 5, at position G1, no bias; with key heads, query/key norm and a quarter of each
head rotated it is the attention of Qwen3-Next. At the start gates are near 1/2: weights are N(0, 0.02) as elsewhere.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.gates import OutputGate
from recollect.layers.modules.linear import Linear


@chz.chz(typecheck=True)
class GatedAttention(SoftmaxConfig):
    """Gated softmax attention. State: every key and value.

    Attributes:
      gate: "channel", one per channel of every head, or "head", one per head.
    """

    gate: Literal["channel", "head"] = "channel"

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedSoftmaxAttention:
        return GatedSoftmaxAttention(self, width, place, rngs)


class GatedSoftmaxAttention(SoftmaxAttention):
    """The module of `GatedAttention`."""

    def __init__(self, config: GatedAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        channels, dims = (config.heads * self.head_dim, "d hv") if config.gate == "channel" else (config.heads, "d h")
        self.gate = OutputGate(Linear(width, channels, dims, rngs), activation="sigmoid")

    def _finish(self, o: Float[Array, "b t h v"], x: jax.Array) -> MixerOutput:
        return MixerOutput(self.output(self.gate(o, x)))
