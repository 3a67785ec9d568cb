"""The gated short convolution of Based's language models (Arora et al. 2024; as in their code, HazyResearch/based):

    [u1, u2] = W_in x + b_in        each of width expansion * d / 2
    y = W_out (silu(conv(u1)) * u2) + b_out

Called BaseConv there too, but unlike Zoology's (`base_convolution.py`) it expands the width, applies SiLU to the
convolution, and has no residual of its own. The convolution has no bias.

State: the last kernel - 1 values of u1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, zero_padding
from recollect.layers.modules.linear import Linear, output_init
from recollect.layers.modules.short_convolution import CausalConvolution, check_kernel


@chz.chz(typecheck=True)
class GatedConvolution(MixerConfig):
    """Based's gated short convolution.

    Attributes:
      kernel: taps of the convolution.
      expansion: width of the input projection in model widths; half of it is convolved, half gates.
      bias: whether the two projections have a bias.
    """

    kernel: int = 3
    expansion: int = 4
    bias: bool = True

    @chz.validate
    def _possible(self) -> None:
        check_kernel(self.kernel)
        if self.expansion < 1:
            raise UserError(f"expansion={self.expansion}: must be at least 1")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GatedConvolutionMixer:
        if self.expansion * width % 2:
            raise UserError(
                f"expansion={self.expansion} times the model width {width} is odd: it must split into two halves"
            )
        return GatedConvolutionMixer(self, width, place, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedConvolutionState:
    """inputs: (b, kernel - 1, expansion * d / 2), oldest first, zeros before the document."""

    inputs: jax.Array
    cursor: Cursor


class GatedConvolutionMixer(Mixer):
    """What `GatedConvolution` builds."""

    def __init__(self, config: GatedConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        inner = config.expansion * width // 2
        self.input = Linear(width, 2 * inner, rngs, bias=config.bias)
        self.convolution = CausalConvolution(inner, config.kernel, rngs)
        self.output = Linear(inner, width, rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        u, gate = jnp.split(self.input(zero_padding(x, context)), 2, axis=-1)
        return MixerOutput(self.output(self.convolution(u, context, out_gate=gate, activation="silu")))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> GatedConvolutionState:
        return GatedConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: jax.Array, state: GatedConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, GatedConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        u, gate = jnp.split(self.input(zero_padding(x, tokens)), 2, axis=-1)
        y, inputs = self.convolution.extend(u, state.inputs, tokens, state.cursor, out_gate=gate, activation="silu")
        return MixerOutput(self.output(y)), GatedConvolutionState(inputs, cursor)
