"""BaseConv, the simplest gated convolution (Arora et al. 2024, Zoology; as in their code, HazyResearch/zoology):

    y = act(conv(u) + b) * act(W u + b') + u

with a short depthwise convolution, or a long one without b (long_base_convolution.py). The layer adds the residual u
itself, besides the block's. State: the last kernel - 1 inputs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, Traits, zero_padding
from recollect.layers.mixers.long_base_convolution import LongBaseConvolutionMixer
from recollect.layers.modules.implicit_filter import TimeUnit
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.convolution import ConvolutionState


@chz.chz(typecheck=True)
class BaseConvolution(MixerConfig):
    """BaseConv.

    Attributes:
      kernel: taps of the short convolution; None for a long filter.
      filter: how a long filter is parametrised.
      maximum_length: longest input of a long filter, and the length that its time is measured in.
      time: of an implicit filter's last tap, see implicit_filter.py.
      activation: act, of both factors.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = dict.fromkeys(("causal", "cross"), "its filter reads one sequence's past")

    kernel: int | None = chz.field(default=3, validator=has_taps)
    filter: Literal["implicit", "explicit"] = "implicit"
    maximum_length: int = chz.field(default=2048, validator=at_least(1))
    time: TimeUnit = "length"
    activation: Literal["none", "silu"] = "none"

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> BaseConvolutionMixer | LongBaseConvolutionMixer:
        if self.kernel is None:
            return LongBaseConvolutionMixer(self, width, place, rngs)
        return BaseConvolutionMixer(self, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return Traits() if self.kernel else Traits(exact_causality=False, maximum_length=self.maximum_length)


class BaseConvolutionMixer(Mixer):
    """The module of `BaseConvolution` with a short convolution."""

    def __init__(self, config: BaseConvolution, width: int, place: Place, rngs: nnx.Rngs):
        assert config.kernel is not None
        self.config = config
        self.projection = Linear(width, width, "d f", rngs, bias=True)
        self.convolution = CausalConvolution(width, config.kernel, rngs, bias=True)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        x = zero_padding(x, context)
        return MixerOutput(self.convolution(x, context, **self._factors(x)) + x)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        return ConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        x = zero_padding(x, tokens)
        y, inputs = self.convolution.extend(x, state.inputs, tokens, state.cursor, **self._factors(x))
        return MixerOutput(y + x), ConvolutionState(inputs, cursor)

    def _factors(self, x: Float[Array, "b t d"]) -> dict[str, Any]:
        """Returns what the convolution is activated by and multiplied with."""
        gate, activation = self.projection(x), self.config.activation
        return {"out_gate": gate if activation == "none" else jax.nn.silu(gate), "activation": activation}
