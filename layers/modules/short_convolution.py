"""Short causal depthwise convolution, as a mixer and as the part that other mixers call.

    y_i = bias + sum_{j < kernel} taps[j] x_{i-j}        per channel, within the document

It shows a token its few predecessors, which recall needs before any linear recurrence can pair a key with the value
that follows it (Arora et al. 2024, Zoology): state whether one precedes a mixer when you compare mixers. Initialised
as torch's Conv1d, uniform on (-1/sqrt(kernel), 1/sqrt(kernel)); taps are stored current token first, torch's last.

State: the last kernel - 1 inputs.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import requires
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place
from recollect.layers.modules.linear import parameter
from recollect.layers.state.convolution import ConvolutionState
from recollect.pallas_kernels.gated_convolution import Activation, short_convolution

has_taps = requires(lambda kernel: kernel >= 1, "a convolution needs at least 1 tap, the current token's")
"""Validator of kernel sizes."""


@chz.chz(typecheck=True)
class ShortConvolution(MixerConfig):
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
        return DepthwiseConvolution(self, width, place, rngs)


class CausalConvolution(nnx.Module):
    """A short convolution as a part of other mixers, without a cursor. Padding in x may hold anything; it reads 0.

    recollect.pallas_kernels.gated_convolution computes gate and activation together with the convolution.
    """

    def __init__(self, channels: int, kernel: int, rngs: nnx.Rngs, *, bias: bool = False):
        bound = kernel**-0.5
        self.kernel_size = kernel
        self.channels = channels

        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.taps = parameter(uniform(kernel, channels), "w f")
        self.bias = parameter(uniform(channels), "f") if bias else None

    def __call__(
        self,
        x: Float[Array, "b t f"],
        context: Context,
        *,
        part: tuple[int, int] = (0, 1),
        out_gate: Float[Array, "b t f"] | None = None,
        activation: Activation = "none",
    ) -> Float[Array, "b t f"]:
        """Returns the convolution of whole sequences, or of part i of n equal parts of the channels (`part=(i, n)`).

        Splitting channels after the convolution costs several times more on CPU, where XLA fuses the gradient across
        the parts.
        """
        index, count = part
        taps = jnp.split(self.taps[...], count, axis=-1)[index]
        bias = None if self.bias is None else jnp.split(self.bias[...], count)[index]
        options: dict[str, Any] = {"out_gate": out_gate, "activation": activation, "segment_ids": context.segments}
        return short_convolution(x, taps, bias, **options)[0]

    def init_state(self, batch_size: int, dtype: Any = jnp.float32) -> Float[Array, "b w f"]:
        """Returns the state before any token: the last kernel - 1 inputs of the document, oldest first."""
        return jnp.zeros((batch_size, self.kernel_size - 1, self.channels), dtype)

    def extend(
        self,
        x: Float[Array, "b t f"],
        state: Float[Array, "b w f"],
        tokens: Context,
        cursor_before: Cursor,
        *,
        out_gate: Float[Array, "b t f"] | None = None,
        activation: Activation = "none",
    ) -> tuple[Float[Array, "b t f"], Float[Array, "b w f"]]:
        """Returns the convolution at the next tokens x, and the state after them; `tokens` are from
        `cursor_before.read`."""
        y, after = short_convolution(
            x,
            self.taps[...],
            None if self.bias is None else self.bias[...],
            out_gate=out_gate,
            activation=activation,
            initial_state=state,
            segment_ids=tokens.segments,
            initial_segment=cursor_before.segment,
            return_state=True,
        )
        assert after is not None
        return y, after


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
