"""DeltaNet: what is stored under a key moves towards the new value by the share beta.

    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T,   o_t = S_t^T q_t / sqrt(k)   per head
    q, k = unit(silu(conv(W x))),   v = silu(conv(W_v x)),   beta_t = sigmoid(W_b x_t),   y = W_o norm(o)

Yang et al. 2024, "Parallelizing linear transformers with the delta rule over sequence length", section 2.2; Schlag,
Irie & Schmidhuber 2021. With `negative_eigenvalues` beta is in (0, 2) (Grazzi et al. 2024, section 4). Heads of
values may share queries and keys. State: (k x v) fp32 per head, and kernel - 1 inputs of each convolution.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, OutputGate, Strength, unit
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream
from recollect.pallas_kernels.linear_recurrence.recurrence import repeat_heads


@chz.chz(typecheck=True)
class DeltaRuleConfig(RecurrentConfig):
    """Base of the delta rules' configs.

    Attributes:
      key_heads: heads of queries and keys, a divisor of `heads`; None: as many.
      kernel: taps of the convolutions of queries, keys and values; None leaves them out.
      negative_eigenvalues: beta in (0, 2) in place of (0, 1).
    """

    key_heads: int | None = chz.field(default=None, validator=at_least(1))
    kernel: int | None = chz.field(default=4, validator=has_taps)
    negative_eigenvalues: bool = False


@chz.chz(typecheck=True)
class DeltaNet(DeltaRuleConfig):
    """DeltaNet.

    Attributes:
      gate: whether silu(W x) multiplies the normalised outputs.
    """

    gate: bool = False

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> DeltaNetMixer:
        return self.in_each_direction(DeltaNetMixer, width, place, rngs)


class DeltaRuleMixer(RecurrentMixer):
    """The base of the delta rules' modules: a member sets `gate`, and may have a decay, or strengths of its own."""

    activates = True
    gate: OutputGate

    def __init__(self, config: DeltaRuleConfig, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        self.strength = Strength(width, config.heads, rngs, largest=2.0 if config.negative_eigenvalues else 1.0)

    def log_decay(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h *k"] | None:
        """Returns the logarithm of the decay; None: there is none."""
        return None

    def strengths(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t h *v"], Float[Array, "b t h #k"]]:
        """Returns how much is written, and how much of what the key stores is erased, fp32."""
        beta = self.strength(x)
        return beta, beta[..., None]

    def operands(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, Any]:
        """Returns the arguments of `linear_recurrence`, from q and k of unit length."""
        write, erase = self.strengths(x)
        return {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": self.log_decay(x),
            "write_strength": write,
            "erase_read": (erase * repeat_heads(k, v.shape[2])).astype(k.dtype),
            "scale": self.sizes.key_dim**-0.5,
        }

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        o = self.recurrence(x, stream, **self.operands(x, unit(q), unit(k), v))
        return self.output(self.gate(o, x))


class DeltaNetMixer(DeltaRuleMixer):
    """The module of `DeltaNet`."""

    def __init__(self, config: DeltaNet, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        _, h, _, v = self.sizes
        self.gate = head_gate(width, h, v, rngs) if config.gate else OutputGate(None, norm=HeadNormalization(h, v))


def head_gate(width: int, heads: int, value_dim: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> OutputGate:
    """Returns the output gate norm(o) * silu(W x), with one norm for all heads."""
    projection = Linear(width, heads * value_dim, "d hv", rngs)
    return OutputGate(projection, norm=HeadNormalization(heads, value_dim, epsilon=epsilon))
