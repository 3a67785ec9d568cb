"""Linear attention: softmax's exp(q . k) replaced by phi(q) . phi(k), so that a state of fixed size stands for all past
keys.

    S_t = gamma S_{t-1} + phi(k_t) v_t^T,   z_t = gamma z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t + epsilon)              without a normaliser: o_t = phi(q_t) S_t

Katharopoulos et al. 2020 (equations 16 to 20); Based's Taylor features (Arora et al. 2024, section 4.1); RetNet's decay
gamma_h = 1 - 2^(-5-h) (Sun et al. 2023, equation 8). The normaliser is one more value column of ones, so numerator and
denominator share one recurrence, its decay and its precision. State: (features x (v + 1)) fp32 per head at any length.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least, requires
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, zero_padding
from recollect.layers.modules import (
    FeatureMap,
    Linear,
    PositionsConfig,
    RMSNormalization,
    Rotary,
    Taylor,
    merge_heads,
    output_init,
    split_heads,
)
from recollect.layers.packing import token_positions
from recollect.pallas_kernels.linear_recurrence import linear_recurrence
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearAttentionState:
    """Sum of products of key features and values, fp32; the last value column is the normaliser's, if there is one."""

    memory: Float[Array, "b h features columns"]
    cursor: Cursor


class LinearAttentionMixer(Mixer):
    """The module of `LinearAttention`."""

    def __init__(self, config: LinearAttention, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.value_dim = width // config.heads
        self.key_dim = config.feature_dim or self.value_dim
        self.query = Linear(width, config.heads * self.key_dim, "d hk", rngs)
        self.key = Linear(width, config.heads * self.key_dim, "d hk", rngs)
        self.value = Linear(width, width, "d hv", rngs)
        self.query_features = config.feature_map.build(config.heads, self.key_dim)
        self.key_features = config.feature_map.build(config.heads, self.key_dim)
        self.output_norm = RMSNormalization(self.value_dim) if config.output_norm else None
        self.output = Linear(width, width, "hv d", rngs, init=output_init(place.depth))

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        return MixerOutput(self._mix(zero_padding(x, context), context)[0])

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> LinearAttentionState:
        config = self.config
        shape = (batch_size, config.heads, config.feature_map.features(self.key_dim), self.value_dim + config.normalise)
        return LinearAttentionState(jnp.zeros(shape, jnp.float32), Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: LinearAttentionState, context: Context = Context()
    ) -> tuple[MixerOutput, LinearAttentionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        past = {"initial_state": state.memory, "initial_segment": state.cursor.segment, "return_state": True}
        hidden, memory = self._mix(zero_padding(x, tokens), tokens, **past)
        return MixerOutput(hidden), LinearAttentionState(memory, cursor)

    def _mix(self, x, context, **past):
        config = self.config
        q, k, v = (split_heads(projection(x), config.heads) for projection in (self.query, self.key, self.value))
        if isinstance(config.positions, Rotary):
            positions = token_positions(context, *x.shape[:2])
            q, k = config.positions(q, positions), config.positions(k, positions)
        past |= {"segment_ids": context.segments, "chunk_size": config.chunk}
        if isinstance(config.feature_map, Taylor) and config.decay == "none":
            # An operation of its own, which makes the features for the state only.
            o, memory = taylor_attention(q, k, v, normalise=config.normalise, epsilon=config.epsilon, **past)
        else:
            o, memory = self._recurrence(q, k, v, **past)
        if self.output_norm is not None:
            o = self.output_norm(o)
        return self.output(merge_heads(o).astype(x.dtype)), memory

    def _recurrence(self, q, k, v, **past):
        config = self.config
        if config.normalise:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        # Kernels multiply in one dtype; the maps compute in fp32.
        q, k = self.query_features(q).astype(v.dtype), self.key_features(k).astype(v.dtype)
        o, memory = linear_recurrence(q, k, v, log_decay=self._log_decay(), **past)
        o = o.astype(jnp.float32)
        return o[..., :-1] / (o[..., -1:] + config.epsilon) if config.normalise else o, memory

    def _log_decay(self) -> Float[Array, " h"] | None:
        if self.config.decay == "none":
            return None
        return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.config.heads, dtype=jnp.float32))))
