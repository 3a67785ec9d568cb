"""Differential attention: the difference of two softmax maps per head, which cancels what both attend to.

    o_i = RMSNorm(sum_j (w1_ij - lambda w2_ij) v_j) (1 - lambda_init)
    lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer),  layer = 0, 1, ...

Ye et al. 2024 (2410.05258), equations 1 to 3: w1 and w2 are softmax maps of queries and keys of half of a head's
dimensions each, values have all of them; the vectors a and b start at N(0, 0.1) and are shared by the heads of a layer,
as is the norm's gain.

Easy to get wrong: the scale is of the halved dimensions; lambda_init is a constant, not the parameter's start alone.
Query maps stand in the order (key head, first or second map, query head of that key head).
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.gates import HeadNormalization
from recollect.layers.modules.linear import normal, parameter
from recollect.layers.modules.score_biases import ScoreBias
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class DifferentialAttention(SoftmaxConfig):
    """Differential attention; `head_dim` is that of values. State: every key and value, as large as `Attention`'s.

    Attributes:
      gain: whether the norm of the difference has one.
    """

    gain: bool = True

    @chz.validate
    def _no_bias(self) -> None:
        if isinstance(self.positions, ScoreBias):
            name = type(self.positions).__name__
            raise UserError(f"DifferentialAttention has two maps per head: positions={name} must be Rotary or learned")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> DifferentialSoftmaxAttention:
        dim = self.head_width(width)
        if dim % 2:
            raise UserError(f"DifferentialAttention halves a head's {dim} dimensions: their number must be even")
        pairs = {"heads": 2 * self.heads, "key_heads": 2 * (self.key_heads or self.heads), "head_dim": dim // 2}
        return DifferentialSoftmaxAttention(chz.replace(self, **pairs), width, place, rngs)


class DifferentialSoftmaxAttention(SoftmaxAttention):
    """The module of `DifferentialAttention`; its config counts maps: twice the heads, of half the dimensions."""

    def __init__(self, config: DifferentialAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        vectors = normal(0.1)(rngs.params(), (4, self.head_dim), jnp.float32)
        self.vectors = parameter(vectors, "e k", decay=False)  # a1, b1, a2, b2
        start = 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(place.index, jnp.float32))
        self.start = parameter(start, "", trainable=False)
        self.norm = HeadNormalization(config.heads // 2, 2 * self.head_dim, gain=config.gain)

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        pairs = self.key_heads // 2
        v = jnp.repeat(v.reshape(*v.shape[:2], pairs, -1), 2, axis=2)
        o = softmax_attention(q, k, v, **self._seen(fields), **fields)
        o = o.reshape(*o.shape[:2], pairs, 2, -1, o.shape[-1]).astype(jnp.float32)
        a1, b1, a2, b2 = self.vectors[...]
        start = self.start[...]
        second = jnp.exp(jnp.sum(a1 * b1)) - jnp.exp(jnp.sum(a2 * b2)) + start
        o = o[:, :, :, 0] - second * o[:, :, :, 1]
        o = self.norm(o.reshape(*o.shape[:2], -1, o.shape[-1])) * (1 - start)
        return self._finish(o.astype(x.dtype), x)
