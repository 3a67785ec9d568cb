"""Comba: a delta rule that erases by the state before its decay, and corrects what is read.

    S_t = (a_t - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T (q_t - D p_t) / sqrt(k)   per head
    p_t = sigmoid(d) k_t,   y = W_o [norm(o) * sigmoid(W_g x)],   a, beta, q, k, v as Gated DeltaNet's

with k p^T S read as the outer product of k with what p reads. Hu et al. 2025, arXiv 2506.02475, equation 9; d and D per
head start at 1, and D at 0.02 in small models. flash-linear-attention normalises p to unit length in its kernels,
which undoes sigmoid(d) in the erase; here it has its effect.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import DeltaRuleConfig
from recollect.layers.mixers.gated_delta_net import GatedDeltaNetMixer
from recollect.layers.modules import parameter


@chz.chz(typecheck=True)
class Comba(DeltaRuleConfig):
    """Comba.

    Attributes:
      correction: D at the start.
    """

    correction: float = 0.02

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> CombaMixer:
        return self.in_each_direction(CombaMixer, width, place, rngs)


class CombaMixer(GatedDeltaNetMixer):
    """The module of `Comba`."""

    def __init__(self, config: Comba, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.gate.activation = "sigmoid"
        self.inner_decay = parameter(jnp.ones(self.sizes.key_heads), "g", decay=False)
        self.correction = parameter(jnp.full(self.sizes.key_heads, config.correction), "g", decay=False)

    def operands(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, Any]:
        share = jax.nn.sigmoid(self.inner_decay[...].astype(jnp.promote_types(q.dtype, jnp.float32)))
        corrected = (q - (self.correction[...] * share)[:, None] * k).astype(q.dtype)
        operands = super().operands(x, corrected, k, v)
        shares = jnp.repeat(share, v.shape[2] // k.shape[2])[:, None]
        erase = (operands["erase_read"] * shares).astype(k.dtype)
        return operands | {"erase_read": erase, "erase_before_decay": True}
