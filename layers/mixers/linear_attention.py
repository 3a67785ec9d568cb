"""Linear attention: softmax's exp(q . k) replaced by phi(q) . phi(k), so that a state of fixed size stands for all past
keys.

    S_t = gamma S_{t-1} + phi(k_t) v_t^T,   z_t = gamma z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t + epsilon)              without a normaliser: o_t = phi(q_t) S_t

Katharopoulos et al. 2020 (equations 16 to 20); Based's Taylor features (Arora et al. 2024, section 4.1); RetNet's decay
gamma_h = 1 - 2^(-5-h) (Sun et al. 2023, equation 8). The normaliser is one more value column of ones, so numerator and
denominator share one recurrence, its decay and its precision. State: (features x (v + 1)) fp32 per head at any length.

With causal=False or cross=True (unordered_keys.py) S and z are sums over all keys, of the document or of a source.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import Context, Place
from recollect.layers.modules import (
    FeatureMap,
    PositionsConfig,
    RMSNormalization,
    Rotary,
    Taylor,
    in_fp32,
    merge_heads,
    retnet_log_decays,
    split_heads,
)
from recollect.layers.packing import token_positions
from recollect.layers.recurrent import HeadSizes, Stream
from recollect.layers.unordered_keys import UnorderedKeysConfig, UnorderedKeysReader
from recollect.pallas_kernels.taylor_attention import taylor_attention


@chz.chz(typecheck=True)
class LinearAttention(UnorderedKeysConfig):
    """Linear attention.

    Attributes:
      heads: number of heads, each with width // heads value dimensions.
      feature_dim: query and key dimensions per head before the feature map (Based: 16); None: width // heads.
      feature_map: phi.
      normalise: divide by the sum of weights; not with maps whose products can be negative.
      epsilon: added to that sum.
      decay: "none", or "retnet" for 1 - 2^(-5-h) on head h.
      positions: None, or Rotary on queries and keys before the map.
      output_norm: RMS norm of each head's output (RetNet), for states that are read without a normaliser.
      chunk: tokens per chunk; None leaves the choice to the backend (which may not support every number).
    """

    heads: int = chz.field(default=1, validator=at_least(1))
    feature_dim: int | None = chz.field(default=None, validator=at_least(1))
    feature_map: FeatureMap = Taylor()
    normalise: bool = True
    epsilon: float = chz.field(default=1e-6, validator=requires(lambda value: value > 0, "must be positive"))
    decay: Literal["none", "retnet"] = "none"
    positions: PositionsConfig | None = None
    output_norm: bool = False
    chunk: int | None = chz.field(default=None, validator=at_least(1))

    @chz.validate
    def _possible(self) -> None:
        if self.decay != "none" and not self.in_order:
            raise UserError(
                f'decay="{self.decay}" needs keys in order: set causal=True and cross=False, or decay="none"'
            )
        if self.normalise and not self.feature_map.positive:
            raise UserError(
                f"{type(self.feature_map).__name__} features may have any sign: set normalise=False "
                "(output_norm=True keeps the scale)"
            )
        if not isinstance(self.positions, Rotary | None):
            raise UserError(
                "LinearAttention takes Rotary positions or none; learned ones belong to the model's embedding"
            )

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LinearAttentionMixer:
        if width % self.heads:
            raise UserError(f"heads={self.heads} does not divide the model width {width}")
        return LinearAttentionMixer(self, width, place, rngs)


class LinearAttentionMixer(UnorderedKeysReader):
    """The module of `LinearAttention`."""

    def __init__(self, config: LinearAttention, width: int, place: Place, rngs: nnx.Rngs):
        value_dim = width // config.heads
        sizes = HeadSizes(config.heads, config.heads, config.feature_dim or value_dim, value_dim)
        super().__init__(config, width, place, rngs, sizes)
        self.query_features = config.feature_map.build(config.heads, sizes.key_dim)
        self.key_features = config.feature_map.build(config.heads, sizes.key_dim)
        self.output_norm = RMSNormalization(value_dim) if config.output_norm else None

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        config = self.config
        if isinstance(config.feature_map, Taylor) and config.decay == "none":
            return self._merged(self._taylor(x, stream), x)
        q, (k, v) = self.queries(x, stream.context), self.keys_and_values(x, stream.context)
        return self.outputs(stream.recurrence(q, k, v, log_decay=self._log_decay(), chunk_size=config.chunk), x)

    def _taylor(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t h v"]:
        """Outputs by an operation of its own, which makes the features for the state only."""
        config = self.config
        q, k = (self._placed(map(x), stream.context) for map in (self.query, self.key))
        v = split_heads(self.value(x), config.heads)
        features, columns = config.feature_map.features(self.sizes.key_dim), self.sizes.value_dim + config.normalise
        zeros = jax.ShapeDtypeStruct((v.shape[0], config.heads, features, columns), jnp.float32)
        options = {"normalise": config.normalise, "epsilon": config.epsilon, "chunk_size": config.chunk}
        return stream.run("memory", zeros, taylor_attention, q, k, v, **options)

    def queries(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t h features"]:
        # Kernels multiply in one dtype; the maps compute in fp32.
        return self.query_features(self._placed(self.query(x), context)).astype(x.dtype)

    def keys_and_values(
        self, x: Float[Array, "b s d"], context: Context
    ) -> tuple[Float[Array, "b s h features"], Float[Array, "b s h v"]]:
        k, v = self.key_features(self._placed(self.key(x), context)), split_heads(self.value(x), self.config.heads)
        if self.config.normalise:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        return k.astype(x.dtype), v

    def outputs(self, o: Float[Array, "b t h v"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        o = in_fp32(o)
        return self._merged(o[..., :-1] / (o[..., -1:] + self.config.epsilon) if self.config.normalise else o, x)

    def _placed(self, x: Float[Array, "b t hk"], context: Context) -> Float[Array, "b t h k"]:
        """Queries or keys, with their positions in them."""
        y, positions = split_heads(x, self.config.heads), self.config.positions
        return positions(y, token_positions(context, *y.shape[:2])) if isinstance(positions, Rotary) else y

    def _merged(self, o: Float[Array, "b t h v"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        o = o if self.output_norm is None else self.output_norm(o)
        return self.output(merge_heads(o).astype(x.dtype))

    def _log_decay(self) -> Float[Array, " h"] | None:
        return None if self.config.decay == "none" else retnet_log_decays(self.config.heads)
