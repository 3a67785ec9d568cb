"""Gated slot attention (GSA): softmax attention over m slots that are overwritten at gated rates; two recurrences.

    K_t = Diag(a_t) K_{t-1} + (1 - a_t) k_t^T,   V_t = Diag(a_t) V_{t-1} + (1 - a_t) v_t^T        (m, k) and (m, v)
    o_t = V_t^T softmax(K_t q_t)   per head,   log a_t = logsigmoid(W_a x_t) / 8,   y = W_o norm(silu(o))

Zhang et al. 2024, equations 7 to 9: SiLU on queries, keys and values, as many slots as a head has key dimensions, a
norm over all heads; the outputs' SiLU as in flash-linear-attention (gsa.py). The first recurrence decays the columns
of its state, the second its rows.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, LogSigmoidDecay, in_fp32, merge_heads
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class GatedSlotAttention(RecurrentConfig):
    """Gated slot attention.

    Attributes:
      slots: per head; None: a head's key dimensions.
      kernel: taps of convolutions of queries, keys and values; None leaves them out.
      temperature: by which log decays are divided.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    slots: int | None = chz.field(default=None, validator=at_least(1))
    kernel: int | None = chz.field(default=None, validator=has_taps)
    temperature: float = chz.field(default=8.0, validator=requires(lambda value: value > 0, "must be positive"))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedSlotAttentionMixer:
        return self.in_each_direction(GatedSlotAttentionMixer, width, place, rngs)


class GatedSlotAttentionMixer(RecurrentMixer):
    """The module of `GatedSlotAttention`."""

    activates = True

    def __init__(self, config: GatedSlotAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        _, h, k, v = self.sizes
        projection = Linear(width, h * (config.slots or k), "d hk", rngs)
        self.decay = LogSigmoidDecay(projection, h, config.temperature)
        self.norm = HeadNormalization(h, v, "all")

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        log_decay = self.decay(x)
        written = -jnp.expm1(log_decay).astype(v.dtype)
        scores = stream.recurrence(q, k, written, value_log_decay=log_decay, name="slot_keys")
        weights = jax.nn.softmax(in_fp32(scores)).astype(v.dtype)
        o = stream.recurrence(weights, written, v, log_decay=log_decay, name="slot_values")
        return self.output(merge_heads(self.norm(jax.nn.silu(o))))
