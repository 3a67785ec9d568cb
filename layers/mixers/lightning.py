"""Lightning attention: linear attention with constant decays, slower in later layers (TransNormerLLM, MiniMax-01).

    S_t = lambda_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t   per head,   y = W_o [norm(o) * gate(W_u x)]
    code:  lambda = exp(-s_h (1 - l / (L - 1) + 1e-5)),  s the slopes of ALiBi, layer l of L
    paper: lambda = exp(-(8 h / H) (1 - l / L)),  h = 0 ... H - 1

TransNormerLLM (Qin et al. 2023, equations 5 to 10 and their code): SiLU on queries and keys, no activation of the gate,
a norm over all heads without a gain; `lrpe` is its rotation in the first layer. MiniMax-01 (2025, section 2.2): SiLU on
queries, keys and values, a sigmoid gate, a norm with a gain. Neither scales q.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.modules import LRPE, HeadNormalization, Linear, OutputGate, alibi_slopes, parameter
from recollect.layers.packing import token_positions
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream

Form = Literal["transnormer", "minimax"]


@chz.chz(typecheck=True)
class Lightning(RecurrentConfig):
    """Lightning attention.

    Attributes:
      form: activations, gate and norm of TransNormerLLM or of MiniMax-01.
      decay: as TransNormerLLM's code has it, or as its paper does (there the first head does not decay).
      lrpe: whether queries and keys carry positions (LRPE-d): TransNormerLLM's first layer.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    form: Form = "minimax"
    decay: Literal["code", "paper"] = "code"
    lrpe: bool = False

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LightningMixer:
        return self.in_each_direction(LightningMixer, width, place, rngs)


class LightningMixer(RecurrentMixer):
    """The module of `Lightning`."""

    def __init__(self, config: Lightning, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width))
        _, h, k, v = self.sizes
        last = place.depth if config.decay == "paper" else max(place.depth - 1, 1)
        # An array where layers are built under vmap: it travels with the weights.
        self.depth_share = parameter(jnp.asarray(place.index / last, jnp.float32), "", trainable=False)
        plain = config.form == "transnormer"
        projection, norm = Linear(width, h * v, "d hv", rngs), HeadNormalization(h, v, "all", 1e-6, gain=not plain)
        self.gate = OutputGate(projection, activation="none" if plain else "sigmoid", norm=norm)
        self.positions = LRPE(h, k) if config.lrpe else None

    def log_decay(self) -> Float[Array, " h"]:
        """Returns the log decays of this layer."""
        h, share = self.sizes.heads, jnp.clip(self.depth_share[...].astype(float), 0, 1)
        if self.config.decay == "paper":
            return -8 * jnp.arange(h) / h * (1 - share)
        return -jnp.asarray(alibi_slopes(h), float) * (1 - share + 1e-5)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        v = jax.nn.silu(v) if self.config.form == "minimax" else v
        if self.positions is not None:
            positions = token_positions(stream.context, *x.shape[:2])
            q, k = self.positions(q, positions), self.positions(k, positions)
        return self.output(self.gate(stream.recurrence(q, k, v, log_decay=self.log_decay()), x))
