"""Hyena, order 2 (Poli et al. 2023, section 3; layout of HazyResearch/zoology):

    [x1, x2, v] = conv3(W_in u + b_in)        a short depthwise convolution with bias on all three
    z = x1 * v
    y = W_out (x2 * (filter * z + D z)) + b_out

with an implicit long filter (`implicit_filter.py`) and a skip D ~ N(0, 1) per channel. D is kept out of the filter: at
initialisation it is thousands of times larger than the filter's taps, and a Fourier transform of both would drown the
taps in the rounding of the skip.

State: the last kernel - 1 inputs of the short convolution, and all inputs z of the long one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import (
    Context,
    Cursor,
    Mixer,
    MixerOutput,
    Place,
    Traits,
    check_length,
    zero_padding,
)
from recollect.layers.modules import Linear, SineFilter, output_init, parameter
from recollect.layers.modules.implicit_filter import TimeUnit
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.state.long_convolution import LongConvolutionCache
from recollect.pallas_kernels.gated_convolution import long_convolution


@chz.chz(typecheck=True)
class Hyena(DirectedConfig):
    """Hyena of order 2.

    Attributes:
      maximum_length: longest input, and the length that the filter's time is measured in.
      filter_order: hidden units of the filter's network.
      kernel: taps of the short convolution.
      heads: groups of channels that share their filters and skips, channel by channel.
      time: of the last tap, see implicit_filter.py.
      trains_times: whether the filter's embedding of times is trained (learning-rate group "filter_times").
    """

    maximum_length: int = chz.field(default=2048, validator=at_least(1))
    filter_order: int = chz.field(default=64, validator=at_least(1))
    kernel: int = chz.field(default=3, validator=has_taps)
    heads: int = chz.field(default=1, validator=at_least(1))
    time: TimeUnit = "length"
    trains_times: bool = False

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> HyenaMixer:
        if width % self.heads:
            raise UserError(f"heads={self.heads} does not divide the model width {width}")
        return self.in_each_direction(HyenaMixer, width, place, rngs)

    @property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, exact_causality=False, maximum_length=self.maximum_length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HyenaState:
    """Past inputs of the short convolution, the last kernel - 1, oldest first, and of the long one."""

    short: Float[Array, "b w f"]
    long: LongConvolutionCache
    cursor: Cursor


class HyenaMixer(Mixer):
    """The module of `Hyena`."""

    def __init__(self, config: Hyena, width: int, place: Place, rngs: nnx.Rngs):
        self.config = config
        self.width = width
        self.input = Linear(width, 3 * width, "d f", rngs, bias=True)
        self.convolution = CausalConvolution(3 * width, config.kernel, rngs, bias=True)
        channels = width // config.heads
        self.filter = SineFilter(
            channels,
            config.maximum_length,
            config.filter_order,
            rngs,
            unit=config.time,
            trains_times=config.trains_times,
        )
        self.skip = parameter(jax.random.normal(rngs.params(), (channels,)), "f")
        self.output = Linear(width, width, "f d", rngs, bias=True, init=output_init(place.depth))

    def __call__(self, x: Float[Array, "b t d"], context: Context = Context()) -> MixerOutput:
        self._check_length(x)
        parts = jnp.split(self.input(zero_padding(x, context)), 3, axis=-1)
        x1, x2 = (self.convolution(parts[index], context, part=(index, 3)) for index in (0, 1))
        z = self.convolution(parts[2], context, part=(2, 3), out_gate=x1)
        taps, skip = self._taps(x.shape[1])
        y = long_convolution(z, taps, out_gate=x2, skip=skip, segment_ids=context.segments)
        return MixerOutput(self.output(y))

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> HyenaState:
        long = LongConvolutionCache.create(batch_size, min(max_length, self.config.maximum_length), self.width, dtype)
        return HyenaState(self.convolution.init_state(batch_size, dtype), long, Cursor.start(batch_size))

    def extend(
        self, x: Float[Array, "b t d"], state: HyenaState, context: Context = Context()
    ) -> tuple[MixerOutput, HyenaState]:
        self._check_length(x)
        tokens, cursor = state.cursor.read(context, *x.shape[:2])
        assert tokens.segments is not None
        inputs = self.input(zero_padding(x, tokens))
        projected, short = self.convolution.extend(inputs, state.short, tokens, state.cursor)
        x1, x2, v = jnp.split(projected, 3, axis=-1)
        z = x1 * v
        taps, skip = self._taps(state.long.slots)
        y, long = state.long.extend(z, taps, tokens.segments)
        y = x2 * (y + skip.astype(z.dtype) * z)
        return MixerOutput(self.output(y)), HyenaState(short, long, cursor)

    def _taps(self, length: int) -> tuple[Float[Array, "t f"], Float[Array, " f"]]:
        """Returns the first taps of every channel's filter, and the skips."""
        heads = self.config.heads
        return jnp.tile(self.filter(length), (1, heads)), jnp.tile(self.skip[...], heads)

    def _check_length(self, x: Float[Array, "b t d"]) -> None:
        check_length(x.shape[1], self.config.maximum_length, "Hyena's maximum_length")
