"""BaseConv, the simplest gated convolution (Arora et al. 2024, Zoology; as in their code, HazyResearch/zoology):

    y = (conv(u) + b) * (W u + b') + u

with a short depthwise convolution, or a long one without b. The layer adds the residual u itself, besides the block's.
An implicit long filter adds the convolution's input to its output (a skip of weight 1: conv(u) = filter * u + u); an
explicit one, a table N(0, 1) of one tap per position, does not.

State: the last kernel - 1 inputs, or with a long filter all of them.
"""

from __future__ import annotations

from typing import Any, Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import at_least
from recollect.layers.mixer import (
    Context,
    Cursor,
    Mixer,
    MixerConfig,
    MixerOutput,
    Place,
    Traits,
    check_length,
    zero_padding,
)
from recollect.layers.modules.implicit_filter import ReluFilter
from recollect.layers.modules.linear import Linear, normal, parameter
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.convolution import ConvolutionState
from recollect.layers.state.long_convolution import LongConvolutionCache
from recollect.pallas_kernels.gated_convolution import long_convolution


@chz.chz(typecheck=True)
class BaseConvolution(MixerConfig):
    """BaseConv.

    Attributes:
      kernel: taps of the short convolution; None for a long filter.
      filter: how a long filter is parametrised.
      maximum_length: longest input of a long filter, and the length that its time is measured in.
    """

    kernel: int | None = chz.field(default=3, validator=has_taps)
    filter: Literal["implicit", "explicit"] = "implicit"
    maximum_length: int = chz.field(default=2048, validator=at_least(1))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> BaseConvolutionMixer:
        return BaseConvolutionMixer(self, width, place, rngs)

    @property
    def traits(self) -> Traits:
        if self.kernel is not None:
            return Traits()
        return Traits(exact_causality=False, maximum_length=self.maximum_length)


class ExplicitFilter(nnx.Module):
    """A table of one tap per position and channel, initialised N(0, 1)."""

    def __init__(self, channels: int, maximum: int, rngs: nnx.Rngs):
        self.taps = parameter(normal(1.0)(rngs.params(), (maximum, channels), jnp.float32), "t f")

    def __call__(self, length: int) -> Float[Array, "t f"]:
        """Returns the first `length` taps."""
        return self.taps[...][:length]


_FILTERS = {"implicit": ReluFilter, "explicit": ExplicitFilter}


class BaseConvolutionMixer(Mixer):
    """The module of `BaseConvolution`."""

    def __init__(self, config: BaseConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.width = width
        self.projection = Linear(width, width, "d f", rngs, bias=True)
        self.convolution = None if config.kernel is None else CausalConvolution(width, config.kernel, rngs, bias=True)
        self.filter = None if config.kernel is not None else _FILTERS[config.filter](width, config.maximum_length, rngs)

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        x = zero_padding(x, context)
        gate = self.projection(x)
        if self.convolution is not None:
            return MixerOutput(self.convolution(x, context, out_gate=gate) + x)
        assert self.filter is not None
        self._check_length(x)
        skip = jnp.ones(self.width) if self.config.filter == "implicit" else None
        y = long_convolution(x, self.filter(x.shape[1]), out_gate=gate, skip=skip, segment_ids=context.segments)
        return MixerOutput(y + x)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> ConvolutionState:
        cursor = Cursor.start(batch_size)
        if self.convolution is not None:
            return ConvolutionState(self.convolution.init_state(batch_size, dtype), cursor)
        slots = min(max_length, self.config.maximum_length)
        return ConvolutionState(LongConvolutionCache.create(batch_size, slots, self.width, dtype), cursor)

    def extend(
        self, x: Float[Array, "b t d"], state: ConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, ConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        x = zero_padding(x, tokens)
        gate = self.projection(x)
        inputs: Any = state.inputs
        if self.convolution is not None:
            y, inputs = self.convolution.extend(x, inputs, tokens, state.cursor, out_gate=gate)
        else:
            assert self.filter is not None
            self._check_length(x)
            y, inputs = inputs.extend(x, self.filter(inputs.slots), tokens.segments)
            y = (y + x if self.config.filter == "implicit" else y) * gate
        return MixerOutput(y + x), ConvolutionState(inputs, cursor)

    def _check_length(self, x: Float[Array, "b t d"]) -> None:
        check_length(x.shape[1], self.config.maximum_length, "BaseConvolution's maximum_length")
