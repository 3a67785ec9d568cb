"""Landmark attention (Mohtashami & Jaggi 2023): the attention to a block's landmark token gates the attention into that
block.

    main_i = softmax over {own block, up to i} and {landmarks of earlier blocks};  w_ij = main_i(landmark of b)
    softmax_b(s_ij)

(the full definition is in recollect.pallas_kernels.landmark_attention). The model inserts the landmarks, one after
every `block` ordinary tokens
of a document: see models/landmarks.py. They pass through every layer as tokens of their own.

Training and prompts run on kernels where there are any. A token against the cache reads keys where they lie (all
blocks), or landmarks, the retrieved blocks and its own (retrieve).

Easy to get wrong: a query never sees its own block's landmark (not even the landmark itself); a landmark's value is
never read; keys are stored unrotated, since with retrieval a block's position depends on the query.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import (
    Context,
    Mixer,
    MixerConfig,
    MixerOutput,
    Place,
    Traits,
    token_positions,
    zero_padding,
)
from recollect.layers.modules.linear import Linear, output_init
from recollect.layers.modules.positions import LearnedPositions, PositionsConfig
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.landmark_attention import landmark_attention, retrieve_blocks


@chz.chz(typecheck=True)
class Landmark(MixerConfig):
    """Landmark attention.

    Attributes:
      block: ordinary tokens in a block; its landmark comes after them.
      heads: query heads; each has width // heads dimensions.
      key_heads: key and value heads, a divisor of `heads`; None: as many.
      positions: None, or Rotary (positions count landmarks).
      retrieve: None reads all earlier blocks (training); k reads the k best for each query and head, with stingy
        positions, so that a model trained at one length reads one many times longer. Set it on a trained model:
        parameters are the same.
    """

    block: int = 8
    heads: int = 1
    key_heads: int | None = None
    positions: PositionsConfig | None = None
    retrieve: int | None = None

    @chz.validate
    def _possible(self) -> None:
        for name in ("block", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise UserError(f"key_heads={self.key_heads}: must divide heads={self.heads}")
        if self.retrieve is not None and self.retrieve < 1:
            raise UserError(f"retrieve={self.retrieve}: must be at least 1, or None to read all blocks")
        if isinstance(self.positions, LearnedPositions):
            raise UserError(
                "Landmark takes Rotary positions or none: learned ones cannot be moved to where a block is retrieved"
            )

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> LandmarkMixer:
        if width % self.heads:
            raise UserError(f"heads={self.heads} does not divide the model width {width}")
        return LandmarkMixer(self, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return Traits(landmark_block=self.block)


class LandmarkMixer(Mixer):
    """What `Landmark` builds; the state is a cache of all tokens, keys unrotated."""

    def __init__(self, config: Landmark, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = width // config.heads
        self.key_heads = config.key_heads or config.heads
        inner = self.key_heads * self.head_dim
        self.query = Linear(width, width, rngs)
        self.key = Linear(width, inner, rngs)
        self.value = Linear(width, inner, rngs)
        self.output = Linear(width, width, rngs, init=output_init(place.depth))

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        b, t, _ = x.shape
        q, k, v = self._project(zero_padding(x, context))
        positions, segments = context.positions, context.segments
        if self.config.retrieve is None and positions is None and segments is None:
            rotated = self._rotate(q, token_positions(context, b, t)), self._rotate(k, token_positions(context, b, t))
            return MixerOutput(self._merge(landmark_attention(*rotated, v, block=self.config.block)))
        positions = token_positions(context, b, t)
        segments = jnp.ones((b, t), jnp.int32) if segments is None else segments
        return MixerOutput(self._merge(self._attend(q, k, v, positions, positions, segments, segments)))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """All blocks are kept: `max_length` counts landmarks too."""
        return KeyValueCache.create(batch_size, max_length, self.key_heads, self.head_dim, self.head_dim, dtype)

    def extend(
        self, x: jax.Array, state: KeyValueCache, context: Context = Context()
    ) -> tuple[MixerOutput, KeyValueCache]:
        tokens, cursor = state.cursor.read(context, x.shape[0], x.shape[1])
        q, k, v = self._project(zero_padding(x, tokens))
        state = state.append(k, v, tokens, cursor)
        keys, values = state.keys.astype(x.dtype), state.values.astype(x.dtype)
        o = self._attend(q, keys, values, tokens.positions, state.positions, tokens.segments, state.segments)
        return MixerOutput(self._merge(o)), state

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        b, t, _ = x.shape
        q = self.query(x).reshape(b, t, self.config.heads, self.head_dim)
        k = self.key(x).reshape(b, t, self.key_heads, self.head_dim)
        return q, k, self.value(x).reshape(b, t, self.key_heads, self.head_dim)

    def _merge(self, o: jax.Array) -> jax.Array:
        return self.output(o.reshape(*o.shape[:2], -1))

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.config.positions is None else self.config.positions(x, positions)

    def _attend(self, q, k, v, query_positions, key_positions, query_segments, key_segments) -> jax.Array:
        fields = {
            "query_positions": query_positions,
            "key_positions": key_positions,
            "query_segments": query_segments,
            "key_segments": key_segments,
        }
        if self.config.retrieve is not None:
            return retrieve_blocks(
                q, k, v, block=self.config.block, top=self.config.retrieve, rotate=self._rotate, **fields
            )
        q, k = self._rotate(q, query_positions), self._rotate(k, key_positions)
        return landmark_attention(q, k, v, block=self.config.block, **fields)
