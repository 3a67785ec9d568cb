"""Relative convolutional multi-head attention (RCMHA): queries, keys and values pass short convolutions, and scores
have a learned part by distance.

    q, k, v = conv(x W_q), conv(x W_k), conv(x W_v + b_v)             three taps per channel, with bias
    s_ij = ((q_i + u) . k_j + q_i . r_{i-j} + b_{i-j}) / sqrt(k)      u, r and b per head, all 0 at the start

Sugiharto, Aradea & Mubarok 2023 (2308.03429): Primer's convolutions (So et al. 2021) on Transformer-XL's scores (Dai et
al. 2019, equation 5) with learned tables; code: hermansh-id/rcmha. Filters are shared by the heads there (one per
dimension of a head); `shared_filters=False` has one per channel. Without `relative` it is Primer's attention.

Differs from that code: convolutions of queries go on from the tokens before, in every split of a sequence, where that
code starts a segment's with zeros; tables hold `maximum` distances, not 4,096 before and 4,096 after; the memory of
`window` - 1 tokens counts from each query, where that code has one per segment, which its last query sees least of.
"""

from __future__ import annotations

from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError, at_least
from recollect.layers.convolved import ConvolvedLinear
from recollect.layers.mixer import MixerOutput, Place, Traits
from recollect.layers.mixers.attention import SoftmaxConfig
from recollect.layers.mixers.convolved_attention import ConvolvedAttention
from recollect.layers.modules.linear import Linear, output_init, parameter
from recollect.layers.modules.score_biases import distances
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.window_cache import WindowCache
from recollect.pallas_kernels.masks import Causal, Mask, SameSegment, Window
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class RelativeConvolutionalAttention(SoftmaxConfig):
    """RCMHA. State: every key and value, or those of a window, and the last inputs of the three convolutions.

    Attributes:
      kernel: taps of the convolutions, the current token's included.
      shared_filters: the heads share filters.
      relative: scores have the learned part; it takes the place of positions.
      window: keys that a query sees, itself included, and distances in the tables; None: all, and `maximum`.
      maximum: distances that have entries in the tables, and so the longest input, where there is no window.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "its convolutions and its table of distances look back only",
        "cross": "its convolutions run over one sequence, and its distances count from a key up to a query of the same",
        "design": "its table of distances looks back only",
    }

    heads: int = chz.field(default=2, validator=at_least(1))
    kernel: int = chz.field(default=3, validator=has_taps)
    shared_filters: bool = True
    relative: bool = True
    window: int | None = chz.field(default=None, validator=at_least(1))
    maximum: int = chz.field(default=2048, validator=at_least(1))

    @chz.validate
    def _one_kind_of_positions(self) -> None:
        if self.relative and self.positions is not None:
            kind = type(self.positions).__name__
            raise UserError(f"positions={kind} beside relative=True: scores have positions; set one of them")

    def mask(self) -> Mask | None:
        return super().mask() if self.window is None else Causal() & SameSegment() & Window(self.window)

    @property
    def traits(self) -> Traits:
        return Traits(maximum_length=self.maximum) if self.relative and self.window is None else super().traits

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> RelativeConvolutionalMixer:
        return RelativeConvolutionalMixer(self, width, place, rngs)


class RelativeConvolutionalMixer(ConvolvedAttention):
    """The module of `RelativeConvolutionalAttention`."""

    config: Any

    def __init__(self, config: RelativeConvolutionalAttention, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        heads, dim = config.heads, self.head_dim
        outputs = self.key_heads * dim
        self.value = Linear(width, outputs, "d gv", rngs, bias=True)
        self.output = Linear(heads * dim, width, "hv d", rngs, bias=True, init=output_init(place.depth))
        for name in ("query", "key", "value"):
            linear = getattr(self, name)
            channels = dim if config.shared_filters else linear.kernel.shape[-1]
            filters = CausalConvolution(channels, config.kernel, rngs, bias=True)
            setattr(self, name, ConvolvedLinear(linear, name, filters))
        if config.relative:
            distances = config.window or config.maximum
            self.content = parameter(jnp.zeros((heads, dim)), "h k", decay=False)
            self.by_distance = parameter(jnp.zeros((distances, heads, dim)), "t h k", decay=False)
            self.of_distance = parameter(jnp.zeros((distances, heads)), "t h", decay=False)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Any:
        """Returns a cache of one slot per token, or of the window's, and the last inputs of the convolutions."""
        window = self.config.window
        if window is None or max_length < window:
            return super().init_state(batch_size, max_length, dtype)
        cache, parts = super().init_state(batch_size, window, dtype)
        return WindowCache(**vars(cache)), parts

    def _mix(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        bias = self._bias(x, q, k, fields)
        if self.config.relative:
            q = q + self.content[...].astype(q.dtype)
        return self._finish(softmax_attention(q, k, v, bias=bias, **self._seen(fields), **fields), x)

    def _bias(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array | None:
        if not self.config.relative:
            return super()._bias(x, q, k, fields)
        # Without positions there is one document from its start: all distances are below the number of tokens.
        far = q.shape[1] if fields["query_positions"] is None else None
        by_distance, of_distance = self.by_distance[...][:far], self.of_distance[...][:far]
        scores = jnp.einsum("bthk,phk->bhtp", q, by_distance.astype(q.dtype)).astype(jnp.float32)
        scores = scores + of_distance.T[:, None]
        at = jnp.clip(distances(q, k, fields), 0, len(of_distance) - 1)[:, None]  # farther ones are not seen
        at = jnp.broadcast_to(at, (*scores.shape[:3], at.shape[-1]))
        return jnp.take_along_axis(scores, at, axis=-1) * self.head_dim**-0.5
