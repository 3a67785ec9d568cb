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
        return self.in_each_direction(DeltaProductMixer, width, place, rngs)


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

    def log_decay(self, x: Float[Array, "b t d"]) -> Float[Array, "b steps h"] | None:
        return self._at(0, self.decay(x)[0]) if self.config.decays else None

    def strengths(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b steps h"], Float[Array, "b steps h 1"]]:
        beta = self.strength(x).reshape(x.shape[0], -1, self.sizes.heads)
        return beta, beta[..., None]

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        g, h, dim, _ = self.sizes
        n, (b, t, _) = self.config.steps, x.shape
        q, k, v = (self.projected(name, x, stream) for name in ("query", "key", "value"))
        q, k, v = unit(q.reshape(b, t, g, dim)), unit(k.reshape(b, t * n, g, dim)), v.reshape(b, t * n, h, -1)
        segments = stream.context.segments
        segments = None if segments is None else jnp.repeat(segments, n, axis=1)
        o = stream.recurrence(**self.operands(x, self._at(n - 1, q), k, v), segment_ids=segments)
        return self.output(self.gate(o[:, n - 1 :: n], x))

    def _at(self, step: int, y: Float[Array, "b t *rest"]) -> Float[Array, "b steps *rest"]:
        """Returns y at one step of each token, zeros at the others: (b, t steps, ...)."""
        (b, t, *rest), n = y.shape, self.config.steps
        return jnp.zeros((b, t, n, *rest), y.dtype).at[:, :, step].set(y).reshape(b, t * n, *rest)
