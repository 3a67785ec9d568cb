"""Sliding-window attention: softmax over the last `window` tokens.

    o_i = sum_{i - window < j <= i} w_ij v_j,   w_ij = exp(s_ij) / (exp(z_h) + sum over seen j' of exp(s_ij'))

Child et al. 2019 and Beltagy et al. 2020 (section 3.1). Two kinds of sinks: "learned", a logit z_h per head in the
denominator (gpt-oss, Agarwal et al. 2025; exp(z_h) is absent without it), and "first", the first tokens of each
document stay visible (Xiao et al. 2023, section 3.2).

Easy to get wrong, the count: here a window of w sees w keys, the query's own included. Zoology's sliding attention
keeps w before the query and so sees w + 1; Based's configs say 256 and its module halves that, to 128 before the query
and so 129 keys.
"""

from __future__ import annotations

from typing import Any, Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import at_least
from recollect.layers.mixer import Context, Cursor, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import parameter
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.masks import Causal, Mask, SameSegment, Sinks, TokenFields, Window
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class SlidingWindow(SoftmaxConfig):
    """Sliding-window attention; its state holds `window` tokens (and the first ones), however long the stream.

    Attributes:
      window: keys that a query sees, itself included.
      sinks: "none"; "learned", a logit per head, initialised to 0; "first", the document's first tokens are seen too.
        With "first" the work over packed documents grows with the length squared; over one document it grows with the
        window.
      first: number of tokens that `sinks="first"` keeps.
    """

    window: int = chz.field(default=64, validator=at_least(1))
    sinks: Literal["none", "learned", "first"] = "none"
    first: int = chz.field(default=4, validator=at_least(1))

    @property
    def kept(self) -> int:
        """Number of first tokens of a document that stay visible."""
        return self.first if self.sinks == "first" else 0

    def mask(self) -> Mask:
        near: Mask = Window(self.window)
        return Causal() & SameSegment() & (near | Sinks(self.kept) if self.kept else near)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SlidingWindowAttention:
        return SlidingWindowAttention(self, width, place, rngs)


class SlidingWindowAttention(SoftmaxAttention):
    """The module of `SlidingWindow`."""

    config: SlidingWindow

    def __init__(self, config: SlidingWindow, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.sinks = parameter(jnp.zeros(config.heads), "h") if config.sinks == "learned" else None

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of `window` slots in a ring, and slots for the first tokens."""
        self._check_length(max_length)
        slots, kept = min(self.config.window, max_length), self.config.kept
        return KeyValueCache.create(
            batch_size, slots, self.key_heads, self.head_dim, self.head_dim, dtype, ring=True, kept=kept
        )

    def _attend(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        positions: Int[Array, "b t"] | None,
        segments: Int[Array, "b t"] | None,
    ) -> Float[Array, "b t h v"]:
        window, kept = self.config.window, self.config.kept
        if not kept:
            return softmax_attention(
                q, k, v, window=window, sinks=self._sink_logits(), query_positions=positions, query_segments=segments
            )
        mask = Causal() & (Window(window) | Sinks(kept)) if segments is None else self.config.mask()
        return softmax_attention(q, k, v, mask=mask, query_positions=positions, query_segments=segments)

    def _remember(
        self,
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        tokens: Context,
        state: KeyValueCache,
        cursor: Cursor,
    ) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g v"], TokenFields, KeyValueCache]:
        # Attend first, append after: a chunk longer than the ring would push out what its first tokens still see.
        assert tokens.positions is not None and tokens.segments is not None
        old = state.fields()
        fields = TokenFields(
            jnp.concatenate([old.positions, tokens.positions], axis=1),
            jnp.concatenate([old.segments, tokens.segments], axis=1),
        )
        keys = jnp.concatenate([state.keys.astype(k.dtype), k], axis=1)
        values = jnp.concatenate([state.values.astype(v.dtype), v], axis=1)
        return keys, values, fields, state.append(k, v, tokens, cursor)

    def _sink_logits(self) -> Float[Array, " h"] | None:
        return None if self.sinks is None else self.sinks[...]
