"""The gated short convolution of Based's language models (Arora et al. 2024; as in their code, HazyResearch/based):

    [u1, u2] = W_in x + b_in        each of width expansion * d / 2
    y = W_out (silu(conv(u1)) * u2) + b_out

Called BaseConv there too, but unlike Zoology's (`base_convolution.py`) it expands the width, applies SiLU to the
convolution, and adds no residual. The convolution has no bias.

State: the last kernel - 1 values of u1.
"""

from __future__ import annotations

from typing import Any

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, zero_padding
from recollect.layers.modules.linear import Linear, output_init
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.convolution import ConvolutionState


@chz.chz(typecheck=True)
class GatedConvolution(MixerConfig):
    """Based's gated short convolution.

    Attributes:
      kernel: taps of the convolution.
      expansion: width of the input projection in model widths; half of it is convolved, half gates.
      bias: whether the two projections have a bias.
    """

    kernel: int = chz.field(default=3, validator=has_taps)
    expansion: int = chz.field(default=4, validator=at_least(1))
    bias: bool = True

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedConvolutionMixer:
        if self.expansion * width % 2:
            raise UserError(
                f"expansion={self.expansion} times the model width {width} is odd: it must split into two halves"
            )
        return GatedConvolutionMixer(self, width, place, rngs)


class GatedConvolutionMixer(Mixer):
    """The module of `GatedConvolution`."""

    def __init__(self, config: GatedConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        inner = config.expansion * width // 2
        self.input = Linear(width, 2 * inner, "d f", rngs, bias=config.bias)
        self.convolution = CausalConvolution(inner, config.kernel, rngs)
        self.output = Linear(inner, width, "f d", rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        u, gate = jnp.split(self.input(zero_padding(x, context)), 2, axis=-1)
        return MixerOutput(self.output(self.convolution(u, context, out_gate=gate, activation="silu")))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        return ConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        u, gate = jnp.split(self.input(zero_padding(x, tokens)), 2, axis=-1)
        y, inputs = self.convolution.extend(u, state.inputs, tokens, state.cursor, out_gate=gate, activation="silu")
        return MixerOutput(self.output(y)), ConvolutionState(inputs, cursor)
