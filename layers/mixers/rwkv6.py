"""RWKV-6 (Finch): linear attention with a decay per channel and token, a bonus for the current token, and inputs mixed
with the token before by amounts that depend on both.

    S_t = Diag(w_t) S_{t-1} + k_t v_t^T,   o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t   per head
    log w_t = -exp(bias_w + tanh(x_w A) B),   y = W_o [norm(o) * silu(W_g x_g)],   r, k, v = W_r x_r, W_k x_k, W_v x_v
    x_c = x_t + (x_{t-1} - x_t) * (mu_c + tanh(z A_c) B_c),   z = x_t + (x_{t-1} - x_t) * mu   for each of the five

Peng et al. 2024, "Eagle and Finch", equations 13 to 20; the norm is over each head, with gains and biases. As o reads
the state before this token, the recurrence is that of keys, values and decays of the token before. Initial values of
mu, bias_w, u and the low-rank maps as in RWKV-LM, of projections this project's. Published: 64 dimensions per head.
"""

from __future__ import annotations

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.modules import (
    HeadNormalization,
    Interpolation,
    Linear,
    LowRank,
    OutputGate,
    in_fp32,
    parameter,
    split_heads,
)
from recollect.layers.modules.initial_values import uniform, zeros
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream

MIXES = {"r": 0.5, "w": 1.0, "k": 1.0, "v": 1.0, "g": 0.5}
"""Input -> exponent of its first mu: 1 - (n / d)^(exponent (1 - l / L)) in channel n of layer l of L."""


@chz.chz(typecheck=True)
class RWKV6(RecurrentConfig):
    """RWKV-6's time mixing.

    Attributes:
      mix_rank, decay_rank: of the low-rank maps of mixing and of the decay.
    """

    mix_rank: int = chz.field(default=32, validator=at_least(1))
    decay_rank: int = chz.field(default=64, validator=at_least(1))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> RWKV6Mixer:
        return self.in_each_direction(RWKV6Mixer, width, place, rngs)


class RWKV6Mixer(RecurrentMixer):
    """The module of `RWKV6`."""

    def __init__(self, config: RWKV6, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width))
        _, h, k, v = self.sizes
        layer, left = jnp.asarray(place.index) / max(place.depth - 1, 1), 1 - jnp.asarray(place.index) / place.depth
        channels, inits = jnp.arange(width) / width, (zeros, uniform(0.01))
        self.mix_all = Interpolation(1 - channels**left)
        self.mixes = nnx.Dict(
            {
                name: LowRank(width, config.mix_rank, width, "d", rngs, bias=True, activation="tanh", inits=inits)
                for name in MIXES
            }
        )
        for name, power in MIXES.items():
            less = 0.3 * layer if name == "v" else 0.0
            self.mixes[name].up.bias = parameter(1 - channels ** (power * left) - less, "d", decay=False)
        self.decay = LowRank(width, config.decay_rank, h * k, "hk", rngs, bias=True, activation="tanh", inits=inits)
        line, n = jnp.linspace(0.0, 1.0, h * k), jnp.arange(h * k)
        self.decay.up.bias = parameter(-6 + 5 * line ** (0.7 + 1.3 * layer), "hk", decay=False)
        bonus = layer * (1 - line) + 0.1 * ((n + 1) % 3 - 1)
        self.bonus = parameter(bonus.reshape(h, k), "h k", decay=False)
        norm = HeadNormalization(h, v, "group", epsilon=64e-5)
        self.gate = OutputGate(Linear(width, h * v, "d hv", rngs), norm=norm)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        h, previous = self.sizes.heads, stream.previous(x)
        z = self.mix_all(x, previous)
        inputs = {name: x + (previous - x) * amount(z) for name, amount in self.mixes.items()}
        r, k, v = self.query(inputs["r"]), self.key(inputs["k"]), self.value(inputs["v"])
        r, k, v, w = (split_heads(y, h) for y in (r, k, v, self.decay(inputs["w"])))
        log_decay = -jnp.exp(in_fp32(w))
        before = (stream.previous(y, name=name) for name, y in (("key", k), ("value", v), ("decay", log_decay)))
        keys, values, decays = before
        o = stream.recurrence(r, keys, values, log_decay=decays)
        bonus = jnp.sum(in_fp32(r * k) * self.bonus[...], axis=-1, keepdims=True)
        return self.output(self.gate(o + (bonus * v).astype(o.dtype), inputs["g"]))
