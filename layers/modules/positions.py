"""Positions of tokens, for mixers and for the embedding."""

from __future__ import annotations

from typing import Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import Config, requires
from recollect.layers.modules.linear import normal, parameter


@chz.chz(typecheck=True)
class PositionsConfig(Config):
    """Base of the position schemes."""


@chz.chz(typecheck=True)
class Rotary(PositionsConfig):
    """Rotary positions (Su et al. 2021, equation 34): pairs of dimensions of q and k are rotated by the
    angle position * base^(-2i/r).

    `fraction` of each head's dimensions are rotated (rounded down to an even number); `layout` states which dimensions
    form a pair: "half" (i with i + r/2) or "interleaved" (2i with 2i + 1).
    """

    base: float = chz.field(default=10_000.0, validator=requires(lambda value: value > 1, "must be above 1"))
    fraction: float = chz.field(default=1.0, validator=requires(lambda value: 0 < value <= 1, "must be in (0, 1]"))
    layout: Literal["half", "interleaved"] = "half"

    def __call__(self, x: Float[Array, "*b t h k"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t h k"]:
        """Returns x rotated by its positions; angles in fp32."""
        rotated = int(x.shape[-1] * self.fraction) // 2 * 2
        rates = self.base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
        angles = positions[..., None, None].astype(jnp.float32) * rates
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        head, rest = x[..., :rotated].astype(jnp.float32), x[..., rotated:]
        half = self.layout == "half"
        a, b = jnp.split(head, 2, axis=-1) if half else (head[..., 0::2], head[..., 1::2])
        pair = [a * cos - b * sin, b * cos + a * sin]
        head = jnp.concatenate(pair, axis=-1) if half else jnp.stack(pair, axis=-1).reshape(head.shape)
        return jnp.concatenate([head.astype(x.dtype), rest], axis=-1)


@chz.chz(typecheck=True)
class LearnedPositions(PositionsConfig):
    """A learned vector per position, up to `maximum` of them. On the model it is added to the embedding (Radford et al.
    2019); on a mixer, to the input of the query and key projections only (Press, Smith & Lewis 2021, section 3.1)."""

    maximum: int = chz.field(default=2048, validator=requires(lambda value: value >= 1, "needs at least one position"))

    def build(self, width: int, rngs: nnx.Rngs) -> PositionTable:
        """Returns the table for vectors of this width."""
        return PositionTable(self.maximum, width, rngs)


class PositionTable(nnx.Module):
    """The module of `LearnedPositions`: vectors by position."""

    def __init__(self, maximum: int, width: int, rngs: nnx.Rngs):
        self.table = parameter(normal()(rngs.params(), (maximum, width), jnp.float32), "t d")

    def __call__(self, positions: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """Returns the vectors at `positions`; NaN past the table, so that a stream that runs over it is noticed."""
        return self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)
