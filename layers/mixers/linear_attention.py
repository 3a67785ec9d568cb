"""Linear attention: softmax's exp(q . k) replaced by phi(q) . phi(k), so that a state of fixed size stands for all past
keys.

    S_t = gamma S_{t-1} + phi(k_t) v_t^T,   z_t = gamma z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t + epsilon)              without a normaliser: o_t = phi(q_t) S_t

Katharopoulos et al. 2020 (equations 16 to 20); Based's Taylor features (Arora et al. 2024, section 4.1); RetNet's decay
gamma_h = 1 - 2^(-5-h) (Sun et al. 2023, equation 8). The normaliser is one more value column of ones, so numerator and
denominator share one recurrence, its decay and its precision. State: (features x (v + 1)) fp32 per head at any length.
"""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import MixerConfig, Place
from recollect.layers.modules import (
    FeatureMap,
    PositionsConfig,
    RMSNormalization,
    Rotary,
    Taylor,
    merge_heads,
    retnet_log_decays,
)
from recollect.layers.packing import token_positions
from recollect.layers.recurrent import HeadSizes, RecurrentMixer, Stream
from recollect.pallas_kernels.taylor_attention import taylor_attention


@chz.chz(typecheck=True)
class LinearAttention(MixerConfig):
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


class LinearAttentionMixer(RecurrentMixer):
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
        q, k, v = self.heads(x, stream)
        if isinstance(config.positions, Rotary):
            positions = token_positions(stream.context, *x.shape[:2])
            q, k = config.positions(q, positions), config.positions(k, positions)
        if isinstance(config.feature_map, Taylor) and config.decay == "none":
            o = self._taylor(q, k, v, stream)
        else:
            o = self._recurrence(q, k, v, stream)
        if self.output_norm is not None:
            o = self.output_norm(o)
        return self.output(merge_heads(o).astype(x.dtype))

    def _taylor(self, q, k, v, stream: Stream):
        """Outputs by an operation of its own, which makes the features for the state only."""
        config = self.config
        features, columns = config.feature_map.features(self.sizes.key_dim), self.sizes.value_dim + config.normalise
        zeros = jax.ShapeDtypeStruct((v.shape[0], config.heads, features, columns), jnp.float32)
        options = {"normalise": config.normalise, "epsilon": config.epsilon, "chunk_size": config.chunk}
        return stream.run("memory", zeros, taylor_attention, q, k, v, **options)

    def _recurrence(self, q, k, v, stream: Stream):
        config = self.config
        if config.normalise:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        # Kernels multiply in one dtype; the maps compute in fp32.
        q, k = self.query_features(q).astype(v.dtype), self.key_features(k).astype(v.dtype)
        o = stream.recurrence(q, k, v, log_decay=self._log_decay(), chunk_size=config.chunk).astype(jnp.float32)
        return o[..., :-1] / (o[..., -1:] + config.epsilon) if config.normalise else o

    def _log_decay(self) -> Float[Array, " h"] | None:
        return None if self.config.decay == "none" else retnet_log_decays(self.config.heads)
