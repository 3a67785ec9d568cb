"""BaseConv with a long filter; with a short one, and the equation: base_convolution.py.

The filter is implicit, or a table N(0, 1) of one tap per position. Either way the convolution's input is added to its
output (a skip of weight 1: conv(u) = filter * u + u). State: all inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.mixer import Context, Cursor, Mixer, MixerOutput, Place, check_length, zero_padding
from recollect.layers.modules.implicit_filter import ReluFilter
from recollect.layers.modules.linear import Linear, normal, parameter
from recollect.layers.state.convolution import ConvolutionState
from recollect.layers.state.long_convolution import LongConvolutionCache
from recollect.pallas_kernels.gated_convolution import long_convolution

if TYPE_CHECKING:
    from recollect.layers.mixers.base_convolution import BaseConvolution


class ExplicitFilter(nnx.Module):
    """A table of one tap per position and channel, initialised N(0, 1)."""

    def __init__(self, channels: int, maximum: int, rngs: nnx.Rngs):
        self.taps = parameter(normal(1.0)(rngs.params(), (maximum, channels), jnp.float32), "t f")

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps."""
        return self.taps[...][:length]


class LongBaseConvolutionMixer(Mixer):
    """The module of `BaseConvolution` with a long filter."""

    def __init__(self, config: BaseConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.width = width
        self.projection = Linear(width, width, "d f", rngs, bias=True)
        self.filter: ReluFilter | ExplicitFilter
        if config.filter == "implicit":
            self.filter = ReluFilter(width, config.maximum_length, rngs, unit=config.time)
        else:
            self.filter = ExplicitFilter(width, config.maximum_length, rngs)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        x = zero_padding(x, context)
        gate = self.projection(x)
        self._check_length(x)
        activated, taps = self.config.activation == "silu", self.filter(x.shape[1])
        factor = None if activated else gate
        y = long_convolution(x, taps, out_gate=factor, skip=jnp.ones(self.width), segment_ids=context.segments)
        return MixerOutput((jax.nn.silu(y) * jax.nn.silu(gate) if activated else y) + x)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        slots = min(max_length, self.config.maximum_length)
        inputs = LongConvolutionCache.create(batch_size, slots, self.width, dtype)
        return ConvolutionState(inputs, Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        x = zero_padding(x, tokens)
        gate = self.projection(x)
        self._check_length(x)
        y, inputs = state.inputs.extend(x, self.filter(state.inputs.slots), tokens.segments)
        y = y + x
        y = y * gate if self.config.activation == "none" else jax.nn.silu(y) * jax.nn.silu(gate)
        return MixerOutput(y + x), ConvolutionState(inputs, cursor)

    def _check_length(self, x: Float[Array, "b t d"]) -> None:
        check_length(x.shape[1], self.config.maximum_length, "BaseConvolution's maximum_length")
