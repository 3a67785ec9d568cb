"""The gated short convolution of Based's language models (Arora et al. 2024; as in their code, HazyResearch/based):

    [u1, u2] = W_in x + b_in        each of width expansion * d / 2
    y = W_out (silu(conv(u1)) * u2) + b_out

With `input_gate` and without an activation it is LFM2's (Liquid AI 2025): y = W_out (conv(u3 * u1) * u2).

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
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Context, Cursor, Mixer, MixerOutput, Place, zero_padding
from recollect.layers.modules.linear import Linear, output_init
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.convolution import ConvolutionState
from recollect.pallas_kernels.gated_convolution import Activation


@chz.chz(typecheck=True)
class GatedConvolution(DirectedConfig):
    """Based's gated short convolution, and LFM2's.

    Attributes:
      kernel: taps of the convolution.
      expansion: width of the input projection in model widths; half of it is convolved, half gates.
      bias: whether the two projections have a bias.
      activation: of the convolution.
      input_gate: a third projection, as wide, multiplies what is convolved.
    """

    kernel: int = chz.field(default=3, validator=has_taps)
    expansion: int = chz.field(default=4, validator=at_least(1))
    bias: bool = True
    activation: Activation = "silu"
    input_gate: bool = False

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedConvolutionMixer:
        if self.expansion * width % 2:
            raise UserError(
                f"expansion={self.expansion} times the model width {width} is odd: it must split into two halves"
            )
        return self.in_each_direction(GatedConvolutionMixer, width, place, rngs)


class GatedConvolutionMixer(Mixer):
    """The module of `GatedConvolution`."""

    def __init__(self, config: GatedConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        inner = config.expansion * width // 2
        self.input = Linear(width, (3 if config.input_gate else 2) * inner, "d f", rngs, bias=config.bias)
        self.convolution = CausalConvolution(inner, config.kernel, rngs)
        self.output = Linear(inner, width, "f d", rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        u, gates = self._project(x, context)
        return MixerOutput(self.output(self.convolution(u, context, **gates)))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        return ConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        u, gates = self._project(x, tokens)
        y, inputs = self.convolution.extend(u, state.inputs, tokens, state.cursor, **gates)
        return MixerOutput(self.output(y)), ConvolutionState(inputs, cursor)

    def _project(self, x: Float[Array, "b t d"], context: Context) -> tuple[Float[Array, "b t f"], dict[str, Any]]:
        """Returns what is convolved, and the options of the convolution."""
        u, out_gate, *in_gate = jnp.split(self.input(zero_padding(x, context)), 2 + self.config.input_gate, axis=-1)
        options = {"out_gate": out_gate, "activation": self.config.activation}
        return u, options | ({"in_gate": in_gate[0]} if in_gate else {})
