"""TTT-Linear: a linear map per head that learns to reconstruct values from keys while it reads.

    f(x; W, b) = x + norm(W^T x + b),   L_t(W, b) = |f(k_t; W, b) - v_t|^2 / 2   per head
    (W_t, b_t) = (W_0, b_0) - c_i sum_s eta_s dL_s/d(W, b) at (W_0, b_0),   o_t = f(q_t; W_t, b_t)
    eta_s = rate sigmoid(W_eta x_s + b_eta) / k,   y = W_o norm(o)

W_0, b_0 are those before the token's mini-batch and the sum is over its tokens up to t, the i-th: Sun et al. 2024
(2407.04620). As in the authors' code: c_i = max(1/i + p_i, 0) (here at least 1e-4), rotary positions counted in the
mini-batch, a layer norm over the outputs; norm is a layer norm per head; W starts normal with deviation 0.02, b, p and
b_eta at 0; mini-batches of 16 tokens. Its convolution and gate, for the Mamba block, are left out. State: 2 (k + 1, k)
fp32 per head.
"""

from __future__ import annotations

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.modules import HeadNormalization, Linear, Rotary, in_fp32, merge_heads, normal, parameter
from recollect.layers.online_descent import online_descent
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, Stream

EPSILON = 1e-6
SMALLEST_SHARE = 1e-4


@chz.chz(typecheck=True)
class TTTLinear(RecurrentConfig):
    """TTT-Linear; keys and values have the same dimensions.

    Attributes:
      batch: tokens per mini-batch, whose gradients are taken at the same map.
      rate: base of the learning rate.
      positions: rotary positions of queries and keys in the mini-batch; None leaves them out.
    """

    batch: int = chz.field(default=16, validator=at_least(1))
    rate: float = chz.field(default=1.0, validator=requires(lambda value: value > 0, "must be positive"))
    positions: Rotary | None = Rotary()

    def sizes(self, width: int) -> HeadSizes:
        sizes = super().sizes(width)
        if sizes.key_dim != sizes.value_dim:
            raise UserError(f"key_dim={sizes.key_dim}: TTTLinear needs as many as value_dim={sizes.value_dim}")
        return sizes

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> TTTLinearMixer:
        return self.in_each_direction(TTTLinearMixer, width, place, rngs)


class TTTLinearMixer(RecurrentMixer):
    """The module of `TTTLinear`."""

    def __init__(self, config: TTTLinear, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs, config.sizes(width))
        _, h, k, v = self.sizes
        self.positions = None if config.positions is None else config.positions.build_in(width, h, k, rngs)
        self.weights = parameter(normal()(rngs.params(), (h, k, v)), "h k v")
        self.bias = parameter(jnp.zeros((h, v)), "h v", decay=False)
        self.gain = parameter(jnp.ones((h, v)), "h v", decay=False)
        self.shift = parameter(jnp.zeros((h, v)), "h v", decay=False)
        self.rate = Linear(width, h, "d h", rngs, bias=True)
        self.share = parameter(jnp.zeros(config.batch), "w", decay=False)
        self.norm = HeadNormalization(1, h * v, "group", epsilon=EPSILON)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        (q, k, v), index, size = self.heads(x, stream), stream.index(x), self.config.batch
        if self.positions is not None:
            q, k = (self.positions.rotate(y, index % size) for y in (q, k))
        q, k, v = in_fp32(q), in_fp32(k), in_fp32(v)
        places = jnp.arange(1, size + 1, dtype=q.dtype)
        share = jnp.maximum(1 / places + self.share[...], SMALLEST_SHARE)
        rate = self.config.rate * jax.nn.sigmoid(in_fp32(self.rate(x))) / k.shape[3]
        start = jnp.concatenate([self.weights[...], self.bias[...][:, None]], axis=1)
        zeros = jax.ShapeDtypeStruct((x.shape[0], 2, *start.shape), jnp.float32)
        # The scan's map moves by the share of a whole mini-batch; what a token reads has moved by its own.
        settings = {"gradient": self._gradient, "index": index, "size": size, "rate": rate * share[-1]}
        q_row, k_row = (jnp.concatenate([y, jnp.ones_like(y[..., :1])], axis=-1) for y in (q, k))
        now, before = stream.run("map", zeros, online_descent, q_row, k_row, v - k, start, **settings)
        o = before + (share / share[-1])[index % size][..., None, None] * (now - before)
        y = merge_heads(q + self._normalised(o))
        return self.output(self.norm(y[:, :, None])[:, :, 0].astype(x.dtype))

    def _normalised(self, z: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + EPSILON)
        return z * self.gain[...] + self.shift[...]

    def _gradient(self, z: Float[Array, "b t h v"], target: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
        return jax.grad(lambda z: jnp.sum((self._normalised(z) - target) ** 2) / 2)(z)
