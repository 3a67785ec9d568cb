"""Blocks with Canon layers: residual short convolutions around and inside of mixers and MLPs that know nothing of them.

Each place's module is wrapped: norms (places a and c) and linear maps (b and d). What a convolution remembers is in the
block's state beside the mixer's (layers/convolved.py): kernel - 1 inputs of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import UserError
from recollect.layers.context import Context, Source
from recollect.layers.convolved import ConvolvedLinear, convolve, streaming
from recollect.layers.mixer import Cursor, MixerConfig, MixerOutput, Place, State
from recollect.layers.modules.linear import Linear
from recollect.layers.modules.short_convolution import CausalConvolution
from recollect.layers.recurrent import RecurrentState, Stream
from recollect.models.stack import Block

QUERY_KEY_VALUE, INSIDE = ("query", "key", "value"), ("gate", "up")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CanonState:
    """The mixer's state, and the last inputs of each convolution of its block."""

    mixer: Any
    canon: RecurrentState


class ConvolvedNorm(nnx.Module):
    """y + conv(y), y = norm(x)."""

    def __init__(self, norm: nnx.Module, name: str, convolution: CausalConvolution):
        self.norm = norm
        self.name = name
        self.convolution = convolution

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        y = self.norm(x)
        return y + convolve(self.convolution, y, self.name)


class CanonBlock(Block):
    """A block with the convolutions of `LanguageModel.canon`."""

    def __init__(self, mixer: MixerConfig, config: Any, place: Place, rngs: nnx.Rngs):
        super().__init__(mixer, config, place, rngs)
        channels_of: dict[str, int] = {}
        places, kernel = config.canon.places, config.canon.kernel
        self.kernel_size = kernel

        def convolution(name: str, channels: int) -> CausalConvolution:
            channels_of[name] = channels
            return CausalConvolution(channels, kernel, rngs)

        if "a" in places:
            self.mixer_norm = ConvolvedNorm(self.mixer_norm, "a", convolution("a", config.width))
        if "b" in places and has_maps(self.mixer, QUERY_KEY_VALUE):
            self._convolve(self.mixer, QUERY_KEY_VALUE, "b", convolution)
        if set(places) & {"c", "d"} and (self.mlp is None or self.mlp_norm is None):
            raise UserError(f"canon.places={places!r}: c and d are in MLPs, and mlp is None")
        if "c" in places and self.mlp_norm is not None:
            self.mlp_norm = ConvolvedNorm(self.mlp_norm, "c", convolution("c", config.width))
        if "d" in places:
            inside = tuple(name for name in INSIDE if has_maps(self.mlp, (name,)))
            if not inside:
                raise UserError(f"canon.places={places!r}: {type(config.mlp).__name__} has nothing inside for d")
            self._convolve(self.mlp, inside, "d", convolution)
        self.channels = tuple(channels_of.items())

    def _convolve(self, module: Any, names: tuple[str, ...], place: str, convolution: Any) -> None:
        for name in names:
            linear, said = getattr(module, name), f"{place}_{name}"
            filters = convolution(said, linear.kernel.shape[-1])
            setattr(module, name, ConvolvedLinear(linear, said, filters, residual=True))

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> MixerOutput:
        with streaming(Stream(context)):
            return super().__call__(x, context)

    def init_state(self, batch_size: int, max_length: int, dtype: Any, source: Source | None = None) -> CanonState:
        """Returns the mixer's state before any token, and zeros."""
        with streaming(Stream(Context())):
            mixer = super().init_state(batch_size, max_length, dtype)
        taps = self.kernel_size - 1
        parts = {name: jnp.zeros((batch_size, taps, channels), dtype) for name, channels in self.channels}
        return CanonState(mixer, RecurrentState(parts, Cursor.start(batch_size)))

    def extend(self, x: Float[Array, "b t d"], state: CanonState, context: Context) -> tuple[MixerOutput, State]:
        """Returns the stream after the layer at the next tokens, and the state after them."""
        tokens, cursor = state.canon.cursor.read(context, *x.shape[:2])
        stream = Stream(tokens, state.canon)
        with streaming(stream):
            out, mixer = super().extend(x, state.mixer, context)
        return out, CanonState(mixer, RecurrentState(stream.after, cursor))


def has_maps(module: Any, names: tuple[str, ...]) -> bool:
    """Returns whether a module has plain linear maps of these names: ones that are convolved already do not count."""
    return all(type(getattr(module, name, None)) is Linear for name in names)
