"""Retention: linear attention with a constant decay per head (RetNet).

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(k),   gamma_h = 1 - 2^(-5-h)   per head
    y = W_o [norm(o) * silu(W_g x)]

Sun et al. 2023, equations 5 to 8; queries and keys are rotated (their xPos without its scaling), and the norm is an RMS
norm per head, as in flash-linear-attention (multiscale_retention.py). Values are twice as wide as the model.
"""

from __future__ import annotations

import chz
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import head_gate
from recollect.layers.modules import Rotary, retnet_log_decays
from recollect.layers.packing import token_positions
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream


@chz.chz(typecheck=True)
class Retention(RecurrentConfig):
    """Retention (RetNet).

    Attributes:
      value_dim: None: 2 width // heads.
      positions: rotary positions of queries and keys; None leaves them out.
    """

    heads: int = chz.field(default=4, validator=at_least(1))
    positions: Rotary | None = Rotary()

    def sizes(self, width: int) -> HeadSizes:
        return super().sizes(width)._replace(value_dim=self.value_dim or 2 * self.share(width))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> RetentionMixer:
        return self.in_each_direction(RetentionMixer, width, place, rngs)


class RetentionMixer(RecurrentMixer):
    """The module of `Retention`."""

    def __init__(self, config: Retention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width))
        _, h, k, v = self.sizes
        self.positions = None if config.positions is None else config.positions.build_in(width, h, k, rngs)
        self.gate = head_gate(width, h, v, rngs)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = self.heads(x, stream)
        if self.positions is not None:
            positions = token_positions(stream.context, *x.shape[:2])
            q, k = self.positions.rotate(q, positions), self.positions.rotate(k, positions)
        log_decay = retnet_log_decays(self.sizes.heads)
        return self.output(self.gate(stream.recurrence(q, k, v, log_decay=log_decay, scale=q.shape[3] ** -0.5), x))
