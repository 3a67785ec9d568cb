"""Softmax attention, and the base of every mixer of the softmax family.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(k)) v_j  over the keys j that i sees, per head,   y = [o_1 ... o_h] W_o

Vaswani et al. 2017, section 3.2; grouped key heads: Ainslie et al. 2023; queries and keys normalised per head before
rotation: Dehghani et al. 2023, section 2. A member of the family is a config that gives the mask and, where decoding
keeps less than everything, a module that states what it keeps.

Easy to get wrong: the head's width is independent of the model's when `head_dim` is set, and so is the scale; keys are
cached after rotation, which is right only while no policy moves them; padded positions may lie past a position table,
whose NaN must not enter.
"""

from __future__ import annotations

from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import UserError, at_least
from recollect.layers import mixer
from recollect.layers.mixer import Context, MixerConfig, MixerOutput, Place, Traits, check_length, zero_padding
from recollect.layers.mixers.softmax_streams import SoftmaxStreams
from recollect.layers.modules import masking
from recollect.layers.modules.dropout import is_share, kept_weights
from recollect.layers.modules.linear import Linear, merge_heads, output_init, split_heads
from recollect.layers.modules.mask_designs import MaskDesign
from recollect.layers.modules.norms import RMSNormalization
from recollect.layers.modules.positions import LearnedPositions, PositionsConfig
from recollect.layers.packing import token_positions
from recollect.layers.state.cache_policy import CachePolicy, Full
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.masks import Mask, SameSegment
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class SoftmaxConfig(MixerConfig):
    """Base of the softmax family's configs.

    Attributes:
      heads: query heads.
      key_heads: key and value heads, a divisor of `heads`; None: as many.
      head_dim: dimensions per head, of queries, keys and values; None: model width // heads, which must divide.
      positions: None; Rotary on queries and keys; LearnedPositions, added to the input of the query and key
        projections; or Alibi or RelativeBias, added to scores.
      query_key_norm: RMS norm of each query and key head before rotation.
      bias: biases on the four projections.
      dropout: share of the softmax weights zeroed in training; kernels take none.
      causal: a query sees the keys up to its own; else all of its document's.
      cross: keys and values are those of `context.source`, all of the query's document (cross_attention.py).
      design: which keys a query sees, in place of those up to its own (layers/modules/mask_designs.py).
    """

    heads: int = chz.field(default=1, validator=at_least(1))
    key_heads: int | None = None
    head_dim: int | None = chz.field(default=None, validator=at_least(1))
    positions: PositionsConfig | None = None
    query_key_norm: bool = False
    bias: bool = False
    dropout: float = chz.field(default=0.0, validator=is_share)
    causal: bool = True
    cross: bool = False
    design: MaskDesign | None = None

    @chz.validate
    def _possible(self) -> None:
        if self.design is not None and (self.cross or not self.causal):
            raise UserError("design states which keys are seen: causal is True and cross False beside it")
        if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
            raise UserError(f"key_heads={self.key_heads}: must divide heads={self.heads}")

    def head_width(self, width: int) -> int:
        """Returns the dimensions per head in a model of this width; raises UserError where the heads do not fit it."""
        if self.head_dim is None and width % self.heads:
            hint = "set head_dim, or another number of heads"
            raise UserError(f"heads={self.heads} does not divide the model width {width}; {hint}")
        return self.head_dim or width // self.heads

    def mask(self) -> Mask | None:
        """Returns the mask: which keys a query sees; None: those of its document up to its own."""
        if self.design is not None:
            return self.design.mask() & SameSegment()
        return None if self.causal and not self.cross else SameSegment()

    @property
    def traits(self) -> Traits:
        limit = self.positions.maximum if isinstance(self.positions, LearnedPositions) else None
        if self.causal or self.cross:
            return Traits(cross=self.cross, maximum_length=limit)
        return Traits(causal=False, streams=False, symmetry="permutation", maximum_length=limit)


@chz.chz(typecheck=True)
class Attention(SoftmaxConfig):
    """Softmax attention over the whole document. State: what `cache` keeps; it acts in decoding alone."""

    cache: CachePolicy = Full()

    @chz.validate
    def _one_cache(self) -> None:
        if self.mask() is not None and not isinstance(self.cache, Full):
            raise UserError(f"cache={type(self.cache).__name__}: a cache policy serves causal attention alone")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SoftmaxAttention:
        if isinstance(self.cache, Full):
            return SoftmaxAttention(self, width, place, rngs)
        from recollect.layers.mixers.policy_attention import PolicyAttention

        return PolicyAttention(self, width, place, rngs)


class SoftmaxAttention(SoftmaxStreams):
    """The module of `Attention`; the base of the softmax family's modules."""

    caches_rotated_keys: ClassVar[bool] = True

    def __init__(self, config: SoftmaxConfig, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = config.head_width(width)
        self.key_heads = config.key_heads or config.heads
        outer, inner = config.heads * self.head_dim, self.key_heads * self.head_dim
        self.query = Linear(width, outer, "d hk", rngs, bias=config.bias)
        self.key = Linear(width, inner, "d gk", rngs, bias=config.bias)
        self.value = Linear(width, inner, "d gv", rngs, bias=config.bias)
        self.output = Linear(outer, width, "hv d", rngs, bias=config.bias, init=output_init(place.depth))
        self.query_norm = RMSNormalization(self.head_dim) if config.query_key_norm else None
        self.key_norm = RMSNormalization(self.head_dim) if config.query_key_norm else None
        positions, heads = config.positions, (config.heads, self.head_dim)
        self.positions = None if positions is None else positions.build_in(width, *heads, rngs)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        self._check_length(x.shape[1])
        if self.config.cross:
            return self._read_source(x, context)
        x = zero_padding(x, context)
        plain = context.positions is None and context.segments is None
        positions = None if plain else token_positions(context, *x.shape[:2])
        fields: dict[str, Any] = {"query_positions": positions, "query_segments": context.segments}
        if (mask := self.config.mask()) is not None:
            fields["query_fields"] = masking.further_fields(mask, context)
        if self.config.dropout and context.key is not None:
            fields["dropout"] = kept_weights(x, self.config.heads, self.config.dropout, context.key)
        return self._mix(x, *self._project(x, positions, context), fields)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token."""
        if self.config.cross or not self.config.causal:
            self._refuse_stream()
        self._check_length(max_length)
        heads, dim, mask = self.key_heads, self.head_dim, self.config.mask()
        return KeyValueCache.create(batch_size, max_length, heads, dim, dim, dtype, mask)

    def _project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g v"]]:
        """Returns queries, keys and values. Positions None: 0, 1, ... in every row."""
        mixer.check_input(x, self.query.kernel.shape[0])
        indices = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        placed = x
        if self.positions is not None:
            placed = zero_padding(self.positions.place(x, indices), context)
        q, k = split_heads(self.query(placed), self.config.heads), split_heads(self.key(placed), self.key_heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.caches_rotated_keys and self.positions is not None:
            q, k = self.positions.rotate(q, indices), self.positions.rotate(k, indices)
        return q, k, split_heads(self.value(x), self.key_heads)

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        """Returns the mixer's output from its input, queries, keys and values and their fields: over whole sequences,
        or, where `fields` has those of keys, with keys and values of a cache. Positions None: one document from its
        start."""
        bias = self._bias(x, q, k, fields)
        return self._finish(softmax_attention(q, k, v, bias=bias, **self._seen(fields), **fields), x)

    def _seen(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `softmax_attention` that state which keys are seen."""
        mask = self.config.mask()
        return {} if mask is None else masking.mask_arguments(mask, fields)

    def _bias(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array | None:
        """Returns what is added to the scores, (b or 1, h, t, s), or None."""
        return None if self.positions is None else self.positions.bias(q, k, fields)

    def _finish(self, o: Float[Array, "b t h v"], x: jax.Array) -> MixerOutput:
        """Returns the mixer's output from the heads' outputs and its input."""
        return MixerOutput(self.output(merge_heads(o)))

    def _check_length(self, length: int) -> None:
        check_length(length, self.config.traits.maximum_length, "the position table's maximum")
