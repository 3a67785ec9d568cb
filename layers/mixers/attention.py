"""Causal softmax attention, and what every mixer of the softmax family shares.

    o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(k)) v_j  a head,   y = [o_1 ... o_h] W_o

Vaswani et al. 2017, section 3.2; grouped key heads: Ainslie et al. 2023; queries and keys normalised a head before they
turn: Dehghani et al. 2023, section 2. A member of the family is a config that gives the mask, and where its streaming
keeps less than everything, a module that says what it keeps.

Easy to get wrong: the head's width is independent of the model's when `head_dim` is set, and so is the scale; keys are
cached after rotation, which is right only while no policy moves them; padded positions may lie past a position table,
whose NaN must not enter.
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
    Cursor,
    Mixer,
    MixerConfig,
    MixerOutput,
    Place,
    Traits,
    token_positions,
    zero_padding,
)
from recollect.layers.modules.linear import Linear, output_init
from recollect.layers.modules.norms import RMSNormalization
from recollect.layers.modules.positions import LearnedPositions, PositionsConfig, Rotary, check_length
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.masks import Causal, Mask, SameSegment, TokenFields
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class SoftmaxConfig(MixerConfig):
    """Base of the softmax family's configs.

    Attributes:
      heads: query heads.
      key_heads: key and value heads, a divisor of `heads`; None: as many.
      head_dim: dimensions a head, of queries, keys and values; None: model width // heads, which must divide.
      positions: None; Rotary on queries and keys; or LearnedPositions, added to what queries and keys are projected
        from.
      query_key_norm: RMS norm of each query and key head before rotation.
      bias: biases on the four projections.
    """

    heads: int = 1
    key_heads: int | None = None
    head_dim: int | None = None
    positions: PositionsConfig | None = None
    query_key_norm: bool = False
    bias: bool = False

    @chz.validate
    def _possible_heads(self) -> None:
        if self.heads < 1:
            raise UserError(f"heads={self.heads}: must be at least 1")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise UserError(f"key_heads={self.key_heads}: must divide heads={self.heads}")
        if self.head_dim is not None and self.head_dim < 1:
            raise UserError(f"head_dim={self.head_dim}: must be at least 1")

    def head_width(self, width: int) -> int:
        """Dimensions of a head in a model of this width.

        Raises:
          UserError: `heads` does not divide the width and `head_dim` is not set; or a head is too narrow to turn.
        """
        if self.head_dim is None and width % self.heads:
            raise UserError(
                f"heads={self.heads} does not divide the model width {width}; set head_dim, or another number of heads"
            )
        dim = self.head_dim or width // self.heads
        if isinstance(self.positions, Rotary) and int(dim * self.positions.fraction) < 2:
            raise UserError(
                f"Rotary(fraction={self.positions.fraction}) turns pairs of dimensions: too few of a head's {dim}"
            )
        return dim

    def mask(self) -> Mask:
        """Which keys a query sees."""
        return Causal() & SameSegment()

    @property
    def traits(self) -> Traits:
        return Traits(maximum_length=self.positions.maximum if isinstance(self.positions, LearnedPositions) else None)


@chz.chz(typecheck=True)
class Attention(SoftmaxConfig):
    """Causal softmax attention over the whole document. State: every key and value."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SoftmaxAttention:
        return SoftmaxAttention(self, width, place, rngs)


class SoftmaxAttention(Mixer):
    """What `Attention` builds; the base of the softmax mixers with a cache."""

    def __init__(self, config: SoftmaxConfig, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = config.head_width(width)
        self.key_heads = config.key_heads or config.heads
        outer, inner = config.heads * self.head_dim, self.key_heads * self.head_dim
        self.query = Linear(width, outer, rngs, bias=config.bias)
        self.key = Linear(width, inner, rngs, bias=config.bias)
        self.value = Linear(width, inner, rngs, bias=config.bias)
        self.output = Linear(outer, width, rngs, bias=config.bias, init=output_init(place.depth))
        self.query_norm = RMSNormalization(self.head_dim) if config.query_key_norm else None
        self.key_norm = RMSNormalization(self.head_dim) if config.query_key_norm else None
        self.positions = config.positions.build(width, rngs) if isinstance(config.positions, LearnedPositions) else None

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        self._check_length(x.shape[1])
        x = zero_padding(x, context)
        plain = context.positions is None and context.segments is None
        positions = None if plain else token_positions(context, *x.shape[:2])
        q, k, v = self._project(x, positions, context)
        return self._mix(x, q, k, v, {"query_positions": positions, "query_segments": context.segments})

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """One slot a token."""
        self._check_length(max_length)
        return KeyValueCache.create(batch_size, max_length, self.key_heads, self.head_dim, self.head_dim, dtype)

    def extend(
        self, x: jax.Array, state: KeyValueCache, context: Context = Context()
    ) -> tuple[MixerOutput, KeyValueCache]:
        tokens, cursor = state.cursor.read(context, x.shape[0], x.shape[1])
        assert tokens.positions is not None and tokens.segments is not None
        x = zero_padding(x, tokens)
        q, k, v = self._project(x, tokens.positions, tokens)
        keys, values, slots, state = self._remember(k, v, tokens, state, cursor)
        fields = {
            "query_positions": tokens.positions,
            "query_segments": tokens.segments,
            "key_positions": slots.positions,
            "key_segments": slots.segments,
        }
        return self._mix(x, q, keys.astype(x.dtype), values.astype(x.dtype), fields), state

    def _project(
        self, x: jax.Array, positions: jax.Array | None, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (b, t, h, k), keys (b, t, g, k) and values (b, t, g, v). No positions stand for 0, 1, ... in every
        row."""
        b, t, _ = x.shape
        indices = jnp.arange(t, dtype=jnp.int32)[None] if positions is None else positions
        placed = x if self.positions is None else zero_padding(x + self.positions(indices).astype(x.dtype), context)
        q = self.query(placed).reshape(b, t, self.config.heads, self.head_dim)
        k = self.key(placed).reshape(b, t, self.key_heads, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if isinstance(self.config.positions, Rotary):
            q, k = self.config.positions(q, indices), self.config.positions(k, indices)
        return q, k, self.value(x).reshape(b, t, self.key_heads, self.head_dim)

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        """From the mixer's input, queries, keys and values and their fields to its output: over one whole sequence, or,
        where `fields` has those of keys, with keys and values of a cache."""
        if "key_positions" in fields:
            o = softmax_attention(q, k, v, mask=self.config.mask(), sinks=self._sink_logits(), **fields)
        else:
            o = self._attend(q, k, v, fields["query_positions"], fields["query_segments"])
        return self._finish(x, o, fields["query_segments"])

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array | None, segments: jax.Array | None
    ) -> jax.Array:
        """Heads' outputs (b, t, h, v) over one whole sequence, as `config.mask()` says. No positions: one document
        from its start."""
        return softmax_attention(q, k, v, query_positions=positions, query_segments=segments)

    def _remember(
        self, k: jax.Array, v: jax.Array, tokens: Context, state: KeyValueCache, cursor: Cursor
    ) -> tuple[jax.Array, jax.Array, TokenFields, KeyValueCache]:
        """Keys, values and fields that new tokens may see, old and new; and the state after them."""
        state = state.append(k, v, tokens, cursor)
        return state.keys, state.values, state.fields(), state

    def _sink_logits(self) -> jax.Array | None:
        """(h,) logits that join the softmax denominators."""
        return None

    def _finish(self, x: jax.Array, o: jax.Array, segments: jax.Array | None) -> MixerOutput:
        """From the mixer's input and the heads' outputs (b, t, h, v) to its output."""
        return MixerOutput(self.output(o.reshape(*o.shape[:2], -1)))

    def _check_length(self, length: int) -> None:
        if isinstance(self.config.positions, LearnedPositions):
            check_length(length, self.config.positions.maximum, "the position table's maximum")
