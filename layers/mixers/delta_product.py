"""DeltaProduct: several steps of the delta rule per token, so that a transition is a product of Householder-like maps.

    S_{t,0} = a_t S_{t-1},   S_{t,j} = S_{t,j-1} + k_{t,j} (beta_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j}))^T,  j = 1 ... n
    o_t = S_{t,n}^T q_t / sqrt(k)   per head,   y = W_o [norm(o) * silu(W_g x)]

Siems et al. 2025, equations 2 and 3 (gated: section 3.3); initial values as Gated DeltaNet's. Each step has its own
key, value and beta from the same token. It runs as n tokens in place of one: the first decays, the last is read.
"""

from __future__ import annotations

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import DeltaRuleConfig
from recollect.layers.mixers.gated_delta_net import GatedDeltaNetMixer
from recollect.layers.modules import Linear, Strength, unit
from recollect.layers.modules.short_convolution import CausalConvolution
from recollect.layers.recurrent import Stream
from recollect.pallas_kernels.linear_recurrence.recurrence import repeat_heads


@chz.chz(typecheck=True)
class DeltaProduct(DeltaRuleConfig):
    """Gated DeltaProduct.

    Attributes:
      steps: of the delta rule per token.
      decays: whether the state decays (Gated DeltaProduct).
    """

    steps: int = chz.field(default=2, validator=at_least(1))
    decays: bool = True

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> DeltaProductMixer:
        return DeltaProductMixer(self, width, place, rngs)


class DeltaProductMixer(GatedDeltaNetMixer):
    """The module of `DeltaProduct`."""

    def __init__(self, config: DeltaProduct, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        g, h, k, v = self.sizes
        n = config.steps
        self.key, self.value = Linear(width, n * g * k, "d gk", rngs), Linear(width, n * h * v, "d hv", rngs)
        for name, channels in {"key": n * g * k, "value": n * h * v}.items():
            if name in self.convolutions:
                self.convolutions[name] = CausalConvolution(channels, config.kernel or 1, rngs)
        self.strength = Strength(width, n * h, rngs, largest=self.strength.largest)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        g, h, key_dim, _ = self.sizes
        n, (b, t, _) = self.config.steps, x.shape

        def steps(y, heads):
            """(b, t, steps heads dim) to (b, t steps, heads, dim)."""
            return y.reshape(b, t * n, heads, -1)

        def at(step, y):
            """(b, t, ...) to (b, t steps, ...): y at one step of each token, zeros at the others."""
            zeros = jnp.zeros((b, t, n, *y.shape[2:]), y.dtype)
            return zeros.at[:, :, step].set(y).reshape(b, t * n, *y.shape[2:])

        q, k, v = (self.projected(name, x, stream) for name in ("query", "key", "value"))
        q, k, v = unit(q.reshape(b, t, g, key_dim)), unit(steps(k, g)), steps(v, h)
        beta = self.strength(x).reshape(b, t * n, h)
        segments = stream.context.segments
        o = stream.recurrence(
            at(n - 1, q),
            k,
            v,
            log_decay=at(0, self.log_decay(x)) if self.config.decays else None,
            write_strength=beta,
            erase_read=(beta[..., None] * repeat_heads(k, h)).astype(k.dtype),
            scale=key_dim**-0.5,
            segment_ids=None if segments is None else jnp.repeat(segments, n, axis=1),
        )
        return self.output(self.gate(o[:, n - 1 :: n], x))
