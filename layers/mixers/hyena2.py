"""Hyena-2, as in StripedHyena 2: a gated convolution whose filter is short and explicit (SE), of medium length and
regularised (MR), or long and implicit (LI).

    q, k, v = conv_3(W_in u)                                  a short depthwise convolution on all three
    y = W_out (q * (filter * (k v) + D k v)) + b_out          filters are shared by the channels of a group

    SE: 7 taps, started as torch's Conv1d; no D
    MR: 128 taps h_j exp(-decay_g j / 127), h ~ N(0, 1e-5^2 / 128); decays constant, spread logarithmically over groups
        from 10^-2 ("weak"), 10^-1 ("normal") or 1 ("strong") to 10^2
    LI: filter_j = sum_i R_i exp(-exp(p_i) exp(gamma_i) j), i to `order`; p starts at -1, exp(gamma) uniform on (0.01,
        0.1), R ~ N(0, 0.1^2 / order)

Ku et al. 2025, "Systems and algorithms for convolutional multi-hybrid language models at scale"; initial values
as in the authors' code (Zymrael/savanna, NVIDIA NeMo): D uniform on +-1/sqrt(taps), of LI +-1/sqrt(the length trained
on), projections this project's. LI streams as the recurrence that it is: `order` numbers per channel; the
others keep their last inputs.
"""

from __future__ import annotations

import math
from typing import Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError, at_least
from recollect.layers.directions import DirectedConfig
from recollect.layers.mixer import Place
from recollect.layers.modules import Linear, merge_heads, normal, output_init, parameter, split_heads
from recollect.layers.modules.initial_values import uniform
from recollect.layers.modules.short_convolution import CausalConvolution, has_taps
from recollect.layers.recurrent import Stream, StreamMixer

SLOWEST = {"weak": -2.0, "normal": -1.0, "strong": 0.0}


@chz.chz(typecheck=True)
class Hyena2(DirectedConfig):
    """Hyena-2.

    Attributes:
      filter: which of the three.
      groups: filters, each for as many channels; None: one per channel.
      taps: of the filter of SE and MR; None: 7 and 128.
      decay: MR's preset.
      order: exponentials in LI's filter.
      length: that LI is trained on, by which D starts.
      kernel: taps of the convolution of q, k and v.
    """

    filter: Literal["SE", "MR", "LI"] = "LI"
    groups: int | None = chz.field(default=None, validator=at_least(1))
    taps: int | None = chz.field(default=None, validator=has_taps)
    decay: Literal["weak", "normal", "strong"] = "weak"
    order: int = chz.field(default=16, validator=at_least(1))
    length: int = chz.field(default=8192, validator=at_least(1))
    kernel: int = chz.field(default=3, validator=has_taps)

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> Hyena2Mixer:
        if width % (self.groups or width):
            raise UserError(f"groups={self.groups} does not divide the model width {width}")
        if self.filter == "LI" and self.taps is not None:
            raise UserError(f'taps={self.taps}: filter="LI" is infinitely long; leave it out, or take "SE" or "MR"')
        return self.in_each_direction(Hyena2Mixer, width, place, rngs)


class Hyena2Mixer(StreamMixer):
    """The module of `Hyena2`."""

    def __init__(self, config: Hyena2, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width)
        self.groups = config.groups or width
        self.input = Linear(width, 3 * width, "d f", rngs)
        self.convolution = CausalConvolution(3 * width, config.kernel, rngs)
        self.filter: ExplicitTaps | ExponentialFilter
        if config.filter == "LI":
            self.filter = ExponentialFilter(self.groups, config.order, rngs)
            bound = config.length**-0.5
        else:
            taps = config.taps or {"SE": 7, "MR": 128}[config.filter]
            self.filter = ExplicitTaps(self.groups, taps, config.decay if config.filter == "MR" else None, rngs)
            bound = taps**-0.5
        skip = None if config.filter == "SE" else parameter(uniform(bound)(rngs.params(), (width,)), "f")
        self.skip = skip
        self.output = Linear(width, width, "f d", rngs, bias=True, init=output_init(place.depth))

    def mix(self, x: Float[Array, "b t d"], stream: Stream) -> Float[Array, "b t d"]:
        q, k, v = jnp.split(stream.convolution(self.convolution, self.input(x), name="inputs"), 3, axis=-1)
        z = k * v
        y = self.filter(z, stream)
        if self.skip is not None:
            y = y + (self.skip[...] * z).astype(y.dtype)
        return self.output(q * y)


class ExplicitTaps(nnx.Module):
    """Filters of SE and MR: a table of taps per group, times a constant decay where there is a preset."""

    def __init__(self, groups: int, taps: int, decay: str | None, rngs: nnx.Rngs):
        init = uniform(taps**-0.5) if decay is None else normal(1e-5 * taps**-0.5)
        self.taps = parameter(init(rngs.params(), (taps, groups), jnp.float32), "w f", decay=False)
        self.decay = decay

    def __call__(self, z: Float[Array, "b t f"], stream: Stream) -> Float[Array, "b t f"]:
        taps = self.taps[...]
        if self.decay is not None:
            length, groups = taps.shape
            rates = jnp.logspace(SLOWEST[self.decay], 2.0, groups)
            taps = taps * jnp.exp(-jnp.linspace(0.0, 1.0, length)[:, None] * rates)
        return stream.filtered("filter", z, jnp.repeat(taps, z.shape[-1] // taps.shape[1], axis=1))


class ExponentialFilter(nnx.Module):
    """Filters of LI: a sum of real exponentials per group."""

    def __init__(self, groups: int, order: int, rngs: nnx.Rngs):
        shape = (groups, order)
        rates = jax.random.uniform(rngs.params(), shape, minval=0.01, maxval=0.1)
        self.log_rate = parameter(jnp.log(rates), "h k", decay=False)
        self.log_scale = parameter(-jnp.ones(shape), "h k", decay=False)
        self.residue = parameter(normal(0.1 / math.sqrt(order))(rngs.params(), shape), "h k", decay=False)

    def __call__(self, z: Float[Array, "b t f"], stream: Stream) -> Float[Array, "b t f"]:
        dtype = jnp.promote_types(z.dtype, jnp.float32)
        rate, scale, residue = (leaf[...].astype(dtype) for leaf in (self.log_rate, self.log_scale, self.residue))
        return merge_heads(stream.modes(split_heads(z, rate.shape[0]), -jnp.exp(scale + rate), residue))
