"""BaseConv, the simplest gated convolution (Arora et al. 2024, Zoology; as in their code, HazyResearch/zoology):

    y = (conv(u) + b) * (W u + b') + u

with a short depthwise convolution, or a long one without b. The residual u is the layer's own, on top of the block's.
An implicit long filter adds the convolution's input to its output (a skip of weight 1: conv(u) = filter * u + u); an
explicit one, a table N(0, 1) of one tap a position, does not.

State: the last kernel - 1 inputs, or with a long filter all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import UserError
from recollect.layers.mixer import Context, Cursor, Mixer, MixerConfig, MixerOutput, Place, Traits, zero_padding
from recollect.layers.modules.implicit_filter import ReluFilter
from recollect.layers.modules.linear import Linear, normal, parameter
from recollect.layers.modules.positions import check_length
from recollect.layers.modules.short_convolution import CausalConvolution, check_kernel
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

    kernel: int | None = 3
    filter: Literal["implicit", "explicit"] = "implicit"
    maximum_length: int = 2048

    @chz.validate
    def _possible(self) -> None:
        check_kernel(self.kernel)
        if self.maximum_length < 1:
            raise UserError(f"maximum_length={self.maximum_length}: must be at least 1")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> BaseConvolutionMixer:
        return BaseConvolutionMixer(self, width, place, rngs)

    @property
    def traits(self) -> Traits:
        if self.kernel is not None:
            return Traits()
        return Traits(exact_causality=False, maximum_length=self.maximum_length)


class ExplicitFilter(nnx.Module):
    """A table of one tap a position and channel, N(0, 1) at the start."""

    def __init__(self, channels: int, maximum: int, rngs: nnx.Rngs):
        self.taps = parameter(normal(1.0)(rngs.params(), (maximum, channels), jnp.float32))

    def __call__(self, length: int) -> jax.Array:
        return self.taps[...][:length]


_FILTERS = {"implicit": ReluFilter, "explicit": ExplicitFilter}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaseConvolutionState:
    """inputs: (b, kernel - 1, d), oldest first; or a LongConvolutionCache."""

    inputs: Any
    cursor: Cursor


class BaseConvolutionMixer(Mixer):
    """What `BaseConvolution` builds."""

    def __init__(self, config: BaseConvolution, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.width = width
        self.projection = Linear(width, width, rngs, bias=True)
        self.convolution = None if config.kernel is None else CausalConvolution(width, config.kernel, rngs, bias=True)
        self.filter = None if config.kernel is not None else _FILTERS[config.filter](width, config.maximum_length, rngs)

    def __call__(self, x: jax.Array, context: Context = Context()) -> MixerOutput:
        x = zero_padding(x, context)
        gate = self.projection(x)
        if self.convolution is not None:
            return MixerOutput(self.convolution(x, context, out_gate=gate) + x)
        assert self.filter is not None
        self._check_length(x)
        skip = jnp.ones(self.width) if self.config.filter == "implicit" else None
        y = long_convolution(x, self.filter(x.shape[1]), out_gate=gate, skip=skip, segment_ids=context.segments)
        return MixerOutput(y + x)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> BaseConvolutionState:
        inputs: Any
        if self.convolution is not None:
            inputs = self.convolution.init_state(batch_size, dtype)
        else:
            inputs = LongConvolutionCache.create(
                batch_size, min(max_length, self.config.maximum_length), self.width, dtype
            )
        return BaseConvolutionState(inputs, Cursor.start(batch_size))

    def extend(
        self, x: jax.Array, state: BaseConvolutionState, context: Context = Context()
    ) -> tuple[MixerOutput, BaseConvolutionState]:
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        x = zero_padding(x, tokens)
        gate = self.projection(x)
        if self.convolution is not None:
            y, inputs = self.convolution.extend(x, state.inputs, tokens, state.cursor, out_gate=gate)
        else:
            assert self.filter is not None and tokens.segments is not None
            self._check_length(x)
            y, inputs = state.inputs.extend(x, self.filter(state.inputs.slots), tokens.segments)
            y = (y + x if self.config.filter == "implicit" else y) * gate
        return MixerOutput(y + x), BaseConvolutionState(inputs, cursor)

    def _check_length(self, x: jax.Array) -> None:
        check_length(x.shape[1], self.config.maximum_length, "BaseConvolution's maximum_length")
