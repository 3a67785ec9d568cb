"""RWKV-7: a delta rule whose key to erase by, strength and decay are vectors of their own.

    S_t = (Diag(w_t) - (a_t * kk_t) kk_t^T) S_{t-1} + k'_t v_t^T,   o_t = S_t^T r_t   per head
    log w = -exp(-1/2) sigmoid(lora_w(x_w)),   a = sigmoid(lora_a(x_a)),   kk = unit(k * k_k),
    k' = k * (1 + (a - 1) * k_a),   r, k, v = W_r x_r, W_k x_k, W_v x_v
    y = W_o [(norm(o) + (r . (k' * r_k)) v) * lora_g(x_g)]
    x_c = x_t + (x_{t-1} - x_t) mu_c for each of the six

and in all layers but the first, with the first layer's values v_1 (`value_residual`),

    v = v + (v_1 - v) * sigmoid(lora_v(x_v))

Peng et al. 2025, equations 3 to 17; initial values as in flash-linear-attention (rwkv7.py), which follows RWKV-LM.
Published: 64 dimensions per head. State: (k x v) fp32 per head, and the input of the token before.
"""

from __future__ import annotations

import math
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.first_values import give, given, holding
from recollect.layers.mixer import Place
from recollect.layers.modules import (
    HeadNormalization,
    Interpolation,
    LowRank,
    in_fp32,
    merge_heads,
    orthogonal,
    parameter,
    split_heads,
    unit,
)
from recollect.layers.modules.initial_values import zeros
from recollect.layers.recurrent import HeadSizes, RecurrentConfig, RecurrentMixer, RecurrentState, Stream

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""Input -> exponent of its first mu: 1 - (n / d)^(exponent (1 - l / L)) in channel n of layer l of L."""


@chz.chz(typecheck=True)
class RWKV7(RecurrentConfig):
    """RWKV-7's time mixing.

    Attributes:
      rank: of the low-rank maps; None: as published, from the width (at least 32).
      value_residual: mix in the values of the last layer of RWKV-7 that does not: published, of the first, as in
        `pretrain.rwkv7_*`. False: values are the layer's own.
    """

    rank: int | None = chz.field(default=None, validator=at_least(1))
    value_residual: bool = False

    @chz.validate
    def _reads_forward(self) -> None:
        if self.value_residual and not self.causal:
            raise UserError("value_residual=True beside causal=False: layers of two directions share no values")

    def sizes(self, width: int) -> HeadSizes:
        sizes = super().sizes(width)
        if sizes.key_dim < 2:
            raise UserError(f"heads={self.heads}: RWKV7 needs at least 2 key dimensions per head; got {sizes.key_dim}")
        return sizes

    def ranks(self, width: int) -> tuple[int, int, int]:
        """Returns the ranks of the maps of decay and strength, of the gate's, and of the first values' share."""
        root, dim = width**0.5, self.sizes(width).key_dim / 64
        small, large, share = (
            self.rank or max(32, round(part / 32) * 32) for part in (2.5 * root * dim, 5 * root, 1.7 * root * dim)
        )
        return small, large, share

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> RWKV7Mixer:
        return self.in_each_direction(RWKV7Mixer, width, place, rngs)


class RWKV7Mixer(RecurrentMixer):
    """The module of `RWKV7`."""

    def __init__(self, config: RWKV7, width: int, place: Place, rngs: nnx.Rngs):
        inits = {"query": orthogonal(), "key": orthogonal(0.1), "value": orthogonal(), "output": zeros}
        super().__init__(config, width, place, rngs, config.sizes(width), inits=inits)
        _, h, k, v = self.sizes
        index, depth = jnp.asarray(place.index, jnp.float32), place.depth
        channels = jnp.arange(width) / width
        mixes = {name: Interpolation(1 - channels ** (power * (1 - index / depth))) for name, power in MIXES.items()}
        self.mixes = nnx.Dict(mixes)
        line, zigzag = jnp.linspace(0.0, 1.0, h * k), jnp.tile(jnp.linspace(-1.0, 1.0, k), h)
        zigzag = zigzag * jnp.abs(zigzag)
        speed = -6 + 6 * line ** (1 + (index / max(depth - 1, 1)) ** 0.3)
        rank, gate_rank, share_rank = config.ranks(width)
        self.decay = self._low_rank(width, rank, h * k, "hk", rngs, activation="tanh", bias=True)
        self.decay.up.bias = parameter(speed + 0.5 + 2.5 * zigzag, "hk")
        self.strength = self._low_rank(width, rank, h * k, "hk", rngs, bias=True)
        self.strength.up.bias = parameter(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5), "hk")
        self.gate = self._low_rank(width, gate_rank, h * v, "hv", rngs, activation="sigmoid")
        share = None
        if config.value_residual:
            share = self._low_rank(width, share_rank, h * v, "hv", rngs, bias=True)
            share.up.bias = parameter(0.93 - 0.4 * jnp.linspace(0.0, 1.0, h * v), "hv")
        self.value_share = share
        self.erase_scale = parameter((0.71 - 0.1 * (line - 0.5)).reshape(h, k), "h k", decay=False)
        self.key_scale = parameter(jnp.full((h, k), 1.02), "h k", decay=False)
        self.bonus = parameter(jnp.full((h, k), -0.04), "h k", decay=False)
        self.norm = HeadNormalization(h, v, "group", epsilon=v * 1e-5)
        self.norm.gain = parameter(jnp.broadcast_to(((index + 1) / depth) ** 0.7, (h, v)), "h v", decay=False)

    def _low_rank(self, width: int, rank: int, outputs: int, dims: str, rngs: nnx.Rngs, **options) -> LowRank:
        inits = (zeros, orthogonal(0.1 * max(1.0, (rank / outputs) ** 0.5)))
        return LowRank(width, rank, outputs, dims, rngs, inits=inits, **options)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> RecurrentState:
        with holding(None):  # shapes follow from a call on abstract tokens, whose values no other layer may read
            return super().init_state(batch_size, max_length, dtype)

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        h, previous = self.sizes.heads, stream.previous(x)
        inputs = {name: mix(x, previous) for name, mix in self.mixes.items()}
        r, k, v = self.query(inputs["r"]), self.key(inputs["k"]), self.value(inputs["v"])
        if self.value_share is None:
            give(v)
        else:
            v = v + (given(v) - v) * jax.nn.sigmoid(in_fp32(self.value_share(inputs["v"]))).astype(v.dtype)
        w, a = self.decay(inputs["w"]), self.strength(inputs["a"])
        r, k, v, w, a = (split_heads(y, h) for y in (r, k, v, w, a))
        a = jax.nn.sigmoid(in_fp32(a))
        kk = unit(k * self.erase_scale[...].astype(k.dtype))
        k = (k * (1 + (a - 1) * self.key_scale[...])).astype(v.dtype)
        o = stream.recurrence(
            r,
            k,
            v,
            log_decay=-(math.e**-0.5) * jax.nn.sigmoid(in_fp32(w)),
            erase_read=kk,
            erase_write=(a * kk).astype(kk.dtype),
            erase_before_decay=True,
        )
        products = jnp.sum(in_fp32(r * k) * self.bonus[...], axis=-1, keepdims=True)
        o = self.norm(o) + (products * v).astype(o.dtype)
        return self.output(merge_heads(o) * self.gate(inputs["g"]))
