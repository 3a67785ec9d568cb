"""Short causal depthwise convolution as a mixer; the equation: layers/modules/short_convolution.py.

It shows a token its few predecessors, which recall needs before any linear recurrence can pair a key with the value
that follows it (Arora et al. 2024, Zoology): state whether one precedes a mixer when you compare mixers.

State: the last kernel - 1 inputs.
"""

from __future__ import annotations

from typing import Any

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Context, Cursor, Mixer, MixerOutput, Place
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.convolution import ConvolutionState
from recollect.pallas_kernels.gated_convolution import Activation


@chz.chz(typecheck=True)
class ShortConvolution(DirectedConfig):
    """A short convolution by itself.

    Attributes:
      kernel: number of taps, the current token's included.
      bias: whether to add a bias per channel.
      activation: applied to the result.
    """

    kernel: int = chz.field(default=4, validator=has_taps)
    bias: bool = False
    activation: Activation = "none"

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> DepthwiseConvolution:
        return self.in_each_direction(DepthwiseConvolution, width, place, rngs)


class DepthwiseConvolution(Mixer):
    """The module of `ShortConvolution`."""

    def __init__(self, config: ShortConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.convolution = CausalConvolution(width, config.kernel, rngs, bias=config.bias)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        return MixerOutput(self.convolution(x, context, activation=self.config.activation))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        return ConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        y, inputs = self.convolution.extend(x, state.inputs, tokens, state.cursor, activation=self.config.activation)
        return MixerOutput(y), ConvolutionState(inputs, cursor)
