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

from typing import Any, ClassVar, Literal

import chz
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError, at_least
from recollect.layers.mixer import Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.linear import parameter
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.window_cache import WindowCache
from recollect.pallas_kernels.masks import Causal, Mask, SameSegment, Sinks, Window, WindowAfter


@chz.chz(typecheck=True)
class SlidingWindow(SoftmaxConfig):
    """Sliding-window attention; its state holds `window` tokens (and the first ones), however long the stream.

    Attributes:
      window: keys that a query sees, itself included; 0, of the first tokens alone, needs `sinks="first"`. With
        causal=False, as many after it as before it: 2 window - 1 in all.
      sinks: "none"; "learned", a logit per head, initialised to 0; "first", the document's first tokens are seen too.
        With "first" the work over packed documents grows with the length squared; over one document it grows with the
        window.
      first: number of tokens that `sinks="first"` keeps.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "cross": "a window is around the query, which has no place in the source",
        "design": "its mask is the window",
    }

    window: int = chz.field(default=64, validator=at_least(0))
    sinks: Literal["none", "learned", "first"] = "none"
    first: int = chz.field(default=4, validator=at_least(1))

    @chz.validate
    def _sees_something(self) -> None:
        if self.window == 0 and self.sinks != "first":
            raise UserError(f'window=0 sees no key with sinks="{self.sinks}": set sinks="first", or a window of 1')

    @property
    def kept(self) -> int:
        """Number of first tokens of a document that stay visible."""
        return self.first if self.sinks == "first" else 0

    def mask(self) -> Mask:
        before: Mask = Causal() if self.causal else WindowAfter(self.window)
        near: Mask = Window(self.window)
        return before & SameSegment() & (near | Sinks(self.kept) if self.kept else near)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SlidingWindowAttention:
        return SlidingWindowAttention(self, width, place, rngs)


class SlidingWindowAttention(SoftmaxAttention):
    """The module of `SlidingWindow`."""

    config: SlidingWindow

    def __init__(self, config: SlidingWindow, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.sinks = parameter(jnp.zeros(config.heads), "h") if config.sinks == "learned" else None

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of `window` slots in a ring, and slots for the first tokens; for streams shorter than the
        window one of a slot per token, which takes no more tokens than that."""
        window, heads, dim = self.config.window, self.key_heads, self.head_dim
        if max_length < window:
            return super().init_state(batch_size, max_length, dtype)
        if not self.config.causal:
            self._refuse_stream()
        self._check_length(max_length)
        return WindowCache.create(batch_size, max(window, 1), heads, dim, dim, dtype, kept=self.config.kept)

    def _seen(self, fields: dict[str, Any]) -> dict[str, Any]:
        return super()._seen(fields) | {"sinks": None if self.sinks is None else self.sinks[...]}
