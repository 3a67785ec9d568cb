"""Short causal depthwise convolution, as a mixer and as the part that other mixers call.

    y_i = bias + sum_{j < kernel} taps[j] x_{i-j}        a channel at a time, within the document

It gives a token sight of its few predecessors, which recall needs before any linear recurrence can pair a key with the
value that follows it (Arora et al. 2024, Zoology): say whether one precedes a mixer when you compare mixers.
Initialised as torch's Conv1d, uniform on (-1/sqrt(kernel), 1/sqrt(kernel)); taps are stored current token first,
torch's last.

State: the last kernel - 1 inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place
from recollect.layers.modules.linear import parameter
from recollect.pallas_kernels.gated_convolution import Activation, short_convolution


def check_kernel(kernel: int | None) -> None:
    """Raises UserError for a kernel size that is not positive; None passes."""
    if kernel is not None and kernel < 1:
        raise UserError(f"kernel={kernel}: a convolution needs at least 1 tap, the current token's")


@chz.chz(typecheck=True)
class ShortConvolution(MixerConfig):
    """A short convolution by itself.

    Attributes:
      kernel: number of taps, the current token's included.
      bias: whether to add a bias a channel.
      activation: what follows.
    """

    kernel: int = 4
    bias: bool = False
    activation: Activation = "none"

    @chz.validate
    def _possible(self) -> None:
        check_kernel(self.kernel)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> DepthwiseConvolution:
        return DepthwiseConvolution(self, width, place, rngs)


class CausalConvolution(nnx.Module):
    """The part: no cursor of its own. Padding in x may hold anything; it reads 0.

    Gates and the activation are recollect.pallas_kernels.gated_convolution's, which computes them in one pass with the
    convolution.
    """

    def __init__(self, channels: int, kernel: int, rngs: nnx.Rngs, *, bias: bool = False):
        bound = kernel**-0.5
        self.kernel_size = kernel
        self.channels = channels
        self.taps = parameter(jax.random.uniform(rngs.params(), (kernel, channels), jnp.float32, -bound, bound))
        self.bias = (
            parameter(jax.random.uniform(rngs.params(), (channels,), jnp.float32, -bound, bound), decay=False)
            if bias
            else None
        )

    def __call__(
        self, x: jax.Array, context: Context, *, out_gate: jax.Array | None = None, activation: Activation = "none"
    ) -> jax.Array:
        """x and out_gate (b, t, channels), whole sequences."""
        return self.piece(x, context, 0, 1, out_gate=out_gate, activation=activation)

    def piece(
        self,
        x: jax.Array,
        context: Context,
        index: int,
        count: int,
        *,
        out_gate: jax.Array | None = None,
        activation: Activation = "none",
    ) -> jax.Array:
        """`__call__` on piece `index` of `count` equal ones of the channels: x (b, t, channels / count).

        Splitting after the convolution costs several times more on CPU, where XLA fuses the gradient through the seams.
        """
        taps = jnp.split(self.taps[...], count, axis=-1)[index]
        bias = None if self.bias is None else jnp.split(self.bias[...], count)[index]
        return short_convolution(x, taps, bias, out_gate=out_gate, activation=activation, segment_ids=context.segments)[
            0
        ]

    def init_state(self, batch_size: int, dtype: Any = jnp.float32) -> jax.Array:
        """(b, kernel - 1, channels): the last inputs of the document, oldest first."""
        return jnp.zeros((batch_size, self.kernel_size - 1, self.channels), dtype)

    def extend(
        self,
        x: jax.Array,
        state: jax.Array,
        tokens: Context,
        cursor_before: Cursor,
        *,
        out_gate: jax.Array | None = None,
        activation: Activation = "none",
    ) -> tuple[jax.Array, jax.Array]:
        """x (b, t, channels), the next tokens; `tokens` from `Cursor.read`, `cursor_before` the cursor that read
        them."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortConvolutionState:
    """inputs: (b, kernel - 1, channels), oldest first, zeros before the document."""

    inputs: jax.Array
    cursor: Cursor


class DepthwiseConvolution(Mixer):
    """What `ShortConvolution` builds."""

    def __init__(self, config: ShortConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.convolution = CausalConvolution(width, config.kernel, rngs, bias=config.bias)

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        return MixerOutput(self.convolution(x, context, activation=self.config.activation))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ShortConvolutionState:
        return ShortConvolutionState(self.convolution.init_state(batch_size, dtype), Cursor.start(batch_size))

    def extend(
        self, x: jax.Array, state: ShortConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ShortConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        y, inputs = self.convolution.extend(x, state.inputs, tokens, state.cursor, activation=self.config.activation)
        return MixerOutput(y), ShortConvolutionState(inputs, cursor)
