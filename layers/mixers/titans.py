"""Titans' long-term memory, linear: a map per head that descends the error of its values, with momentum and forgetting.

    L_t(W) = |W^T k_t - v_t|^2 / 2,   M_t = eta_t M_{t-1} - theta_t dL_t/dW at W_0,   W_t = alpha_t W_{t-1} + M_t
    q, k = unit(silu(conv(W x))),   v = silu(conv(W_v x)),   o_t = W_t^T q_t   per head
    y = W_o [norm(o) * silu(W_g x)],   alpha, eta = sigmoid(W x + b),   theta = rate sigmoid(W x + b) / batch

W_0 is the map before the token's mini-batch, and W and M start from 0. Behrouz, Zhong & Mirrokni 2025 (2501.00663):
the memory alone (LMM), with one layer. The authors published no code and no initial values: alpha starts at 0.98, eta
and sigmoid(theta) at 0.5, and theta is divided by the mini-batch, because a step is as long as all of its gradients,
taken at one map. Their memories are deep, and stand beside attention.
State: 3 (k, v) fp32 per head, kernel - 1 inputs of each convolution.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.mixers.delta_net import head_gate
from recollect.layers.modules import Linear, in_fp32, parameter, unit
from recollect.layers.modules.short_convolution import has_taps
from recollect.layers.online_descent import online_descent
from recollect.layers.recurrent import RecurrentConfig, RecurrentMixer, Stream

KEEPS = 4.0
"""First bias of alpha's gate: it keeps 98%."""


@chz.chz(typecheck=True)
class Titans(RecurrentConfig):
    """Titans' linear memory.

    Attributes:
      batch: tokens per mini-batch, whose gradients are taken at the same map.
      rate: largest sum of a mini-batch's learning rates.
      kernel: taps of the convolutions of queries, keys and values; None leaves them out.
    """

    batch: int = chz.field(default=16, validator=at_least(1))
    rate: float = chz.field(default=1.0, validator=requires(lambda value: value > 0, "must be positive"))
    kernel: int | None = chz.field(default=4, validator=has_taps)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> TitansMixer:
        return self.in_each_direction(TitansMixer, width, place, rngs)


class TitansMixer(RecurrentMixer):
    """The module of `Titans`."""

    activates = True

    def __init__(self, config: Titans, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width), kernel=config.kernel)
        _, h, _, v = self.sizes
        self.keep, self.momentum, self.rate = (Linear(width, h, "d h", rngs, bias=True) for _ in range(3))
        self.keep.bias = parameter(jnp.full(h, KEEPS), "h")
        self.gate = head_gate(width, h, v, rngs)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = map(in_fp32, self.heads(x, stream))
        b, _, h, key_dim = k.shape
        start = jnp.zeros((h, key_dim, v.shape[3]))
        size = self.config.batch
        o, _ = stream.run(
            "map",
            jax.ShapeDtypeStruct((b, 3, *start.shape), jnp.float32),
            online_descent,
            unit(q),
            unit(k),
            v,
            start,
            gradient=lambda predicted, v: predicted - v,
            index=stream.index(x),
            size=size,
            rate=self.config.rate / size * jax.nn.sigmoid(in_fp32(self.rate(x))),
            log_momentum=jax.nn.log_sigmoid(in_fp32(self.momentum(x))),
            log_keep=jax.nn.log_sigmoid(in_fp32(self.keep(x))),
        )
        return self.output(self.gate(o, x))
