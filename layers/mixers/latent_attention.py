"""Multi-head latent attention (MLA): keys and values of all heads are maps of one short vector per token, the latent,
which is all that the cache keeps (and a rotated part of the keys, shared by the heads).

    c_t = RMSNorm(x_t W_c),   k_t,h = [c_t W_k,h ; rotate(x_t W_r)],   v_t,h = c_t W_v,h
    q_t,h = [x_t W_q,h ; rotate(x_t W_s,h)]     (x_t through a latent of its own where `query_rank` is set)

DeepSeek-V2 (2405.04434), section 2.1, equations 9 to 19. Decoding multiplies queries by W_k once, and outputs by W_v
once, instead of every cached latent ("absorbed"): attention with one key head of rank + rotary dimensions.

Easy to get wrong: the scale is that of both parts together, (k + rotary)^(-1/2), in the absorbed form too; pairs are
interleaved in the published code. Without positions the shared part is not rotated (Kimi Linear's "NoPE"), and
`rotary_dim=0` leaves it out.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import Context, MixerConfig, MixerOutput, Place, Traits, check_input
from recollect.layers.mixers.attention import SoftmaxAttention
from recollect.layers.modules.dropout import is_share
from recollect.layers.modules.linear import Linear, output_init, split_heads
from recollect.layers.modules.norms import RMSNormalization
from recollect.layers.modules.positions import Rotary
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.masks import Mask, SameSegment
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class LatentAttention(MixerConfig):
    """Multi-head latent attention. State: a latent and the shared part of the keys, per token.

    Attributes:
      heads: heads.
      rank: dimensions of the latent.
      query_rank: of the queries' own latent; None: queries are maps of the input.
      key_dim, value_dim: dimensions per head without the shared part; None: model width // heads.
      rotary_dim: dimensions of the shared part of the keys; 0: there is none.
      positions: Rotary, of the shared part; None leaves it as it is.
      dropout: share of the softmax weights zeroed in training; kernels take none.
      causal, cross: as of `SoftmaxConfig`.
    """

    heads: int = chz.field(default=2, validator=at_least(1))
    rank: int = chz.field(default=64, validator=at_least(1))
    query_rank: int | None = chz.field(default=None, validator=at_least(1))
    key_dim: int | None = chz.field(default=None, validator=at_least(1))
    value_dim: int | None = chz.field(default=None, validator=at_least(1))
    rotary_dim: int = chz.field(default=16, validator=requires(lambda n: n >= 0 and n % 2 == 0, "must be even"))
    positions: Rotary | None = Rotary(layout="interleaved")
    dropout: float = chz.field(default=0.0, validator=is_share)
    causal: bool = True
    cross: bool = False

    def mask(self) -> Mask | None:
        """Returns the mask: which keys a query sees; None: those of its document up to its own."""
        return None if self.causal and not self.cross else SameSegment()

    @property
    def traits(self) -> Traits:
        if self.causal or self.cross:
            return Traits(cross=self.cross)
        return Traits(causal=False, streams=False, symmetry="permutation")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> MultiHeadLatentAttention:
        if None in (self.key_dim, self.value_dim) and width % self.heads:
            hint = "set key_dim and value_dim, or another number of heads"
            raise UserError(f"heads={self.heads} does not divide the model width {width}; {hint}")
        return self.module(width, place, rngs)

    def module(self, width: int, place: Place, rngs: nnx.Rngs) -> MultiHeadLatentAttention:
        """Returns the module, of a width that fits."""
        return MultiHeadLatentAttention(self, width, place, rngs)


class MultiHeadLatentAttention(SoftmaxAttention):
    """The module of `LatentAttention`."""

    config: Any

    def __init__(self, config: LatentAttention, width: int, place: Place, rngs: nnx.Rngs):
        heads = config.heads
        self.config = config
        self.key_dim, self.value_dim = (dim or width // heads for dim in (config.key_dim, config.value_dim))
        self.scale = (self.key_dim + config.rotary_dim) ** -0.5
        self.down = Linear(width, config.rank, "d u", rngs)
        self.norm = RMSNormalization(config.rank)
        self.shared_key = Linear(width, config.rotary_dim, "d k", rngs) if config.rotary_dim else None
        self.key_up = Linear(config.rank, heads * self.key_dim, "u hk", rngs)
        self.value_up = Linear(config.rank, heads * self.value_dim, "u hv", rngs)
        inputs, letter = (config.query_rank, "u") if config.query_rank else (width, "d")
        self.query_down = Linear(width, inputs, "d u", rngs) if config.query_rank else None
        self.query_norm = RMSNormalization(inputs) if config.query_rank else None
        self.query = Linear(inputs, heads * (self.key_dim + config.rotary_dim), f"{letter} hk", rngs)
        self.output = Linear(heads * self.value_dim, width, "hv d", rngs, init=output_init(place.depth))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token: latents as keys, the shared part of the keys as values."""
        return KeyValueCache.create(batch_size, max_length, 1, self.config.rank, self.config.rotary_dim, dtype)

    def _project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t 1 u"], Float[Array, "b t 1 r"]]:
        """Returns queries, latents and the shared part of the keys."""
        check_input(x, self.down.kernel.shape[0])
        of_queries = x
        if self.query_down is not None and self.query_norm is not None:
            of_queries = self.query_norm(self.query_down(x))
        q = split_heads(self.query(of_queries), self.config.heads)
        latent = self.norm(self.down(x))[:, :, None]
        if self.shared_key is None:
            return q, latent, latent[..., :0]
        shared = self.shared_key(x)[:, :, None]
        if self.config.positions is not None:
            at = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
            turned = self.config.positions(q[..., self.key_dim :], at)
            q, shared = jnp.concatenate([q[..., : self.key_dim], turned], axis=-1), self.config.positions(shared, at)
        return q, latent, shared

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        latent, shared, heads = k, v, self.config.heads
        if "key_positions" in fields:
            q, k = self._absorbed(q, latent, shared)
            o = softmax_attention(q, k, latent, scale=self.scale, **self._seen(fields), **fields)
            return self._finish(jnp.einsum("bthu,uhv->bthv", o, self._by_head(self.value_up, x.dtype)), x)
        k, v = self._keys(latent, shared), split_heads(self.value_up(latent[:, :, 0]), heads)
        return self._finish(softmax_attention(q, k, v, scale=self.scale, **self._seen(fields), **fields), x)

    def _absorbed(
        self, q: Float[Array, "b t h k"], latent: Float[Array, "b s 1 u"], shared: Float[Array, "b s 1 r"]
    ) -> tuple[Float[Array, "b t h c"], Float[Array, "b s 1 c"]]:
        """Returns queries multiplied by W_k, and the keys that all heads share: latents, with their rotated part."""
        absorbed = jnp.einsum("bthk,uhk->bthu", q[..., : self.key_dim], self._by_head(self.key_up, q.dtype))
        q = jnp.concatenate([absorbed, q[..., self.key_dim :]], axis=-1)
        return q, jnp.concatenate([latent, shared], axis=-1)

    def _by_head(self, linear: Linear, dtype: Any) -> Float[Array, "u h k"]:
        return split_heads(linear.kernel[...][None].astype(dtype), self.config.heads)[0]

    def _keys(self, latent: Float[Array, "b t 1 u"], shared: Float[Array, "b t 1 r"]) -> Float[Array, "b t h k"]:
        """Returns the keys of all heads, both parts of them."""
        k = split_heads(self.key_up(latent[:, :, 0]), self.config.heads)
        return jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:3], shared.shape[-1]))], axis=-1)
