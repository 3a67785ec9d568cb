"""Linear maps followed by a short convolution over time, inside modules that know nothing of it.

    query = ConvolvedLinear(linear, "query", CausalConvolution(channels, 4, rngs), residual=True)
    with streaming(Stream(context)):
        mixer(x, context)                       # mixer.query(x) is W x + b, and its convolution over time

What a convolution remembers from call to call is a part of the stream (layers/recurrent.py), under its name. The stream
is looked up while the program is traced, so that neither mixers nor MLPs have to hand it on.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Linear
from recollect.layers.modules.short_convolution import CausalConvolution
from recollect.layers.recurrent import Stream

_stream: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("stream", default=None)


@contextlib.contextmanager
def streaming(stream: Stream) -> Iterator[None]:
    """Makes `stream` the one of every `ConvolvedLinear` called inside."""
    before = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(before)


def convolve(convolution: CausalConvolution, x: Float[Array, "b t f"], name: str) -> Float[Array, "b t f"]:
    """Returns a convolution of x, what it remembers under `name`; filters of fewer channels are repeated, for one head
    after another."""
    stream = _stream.get()
    if stream is None:
        raise ValueError(f"{name} is convolved over time: call its module inside of `streaming`")
    repeats = x.shape[-1] // convolution.channels
    taps = jnp.tile(convolution.taps[...], (1, repeats))
    bias = None if convolution.bias is None else jnp.tile(convolution.bias[...], repeats)
    return stream.filtered(name, x, taps, bias)


class ConvolvedLinear(Linear):
    """conv(W x + b), or with `residual` W x + b + conv(W x + b): the parameters of `linear`, and filters, under `name`
    in the stream."""

    def __init__(self, linear: Linear, name: str, convolution: CausalConvolution, *, residual: bool = False):
        self.kernel = linear.kernel
        self.bias = linear.bias
        self.name = name
        self.residual = residual
        self.convolution = convolution

    def __call__(self, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
        y = super().__call__(x)
        convolved = convolve(self.convolution, y, self.name)
        return y + convolved if self.residual else convolved
