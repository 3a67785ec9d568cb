"""Positions of tokens, for mixers and for the embedding."""

from __future__ import annotations

from typing import Literal

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.configuration import Config, UserError
from recollect.layers.modules.linear import normal, parameter


@chz.chz(typecheck=True)
class PositionsConfig(Config):
    """Base of the position schemes."""


@chz.chz(typecheck=True)
class Rotary(PositionsConfig):
    """Rotary positions (Su et al. 2021, equation 34): pairs of dimensions of q and k turn by position * base^(-2i/r).

    `fraction` of each head's dimensions turn (rounded down to an even number); `layout` says which dimensions pair up:
    "half" (i with i + r/2) or "interleaved" (2i with 2i + 1).
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"

    @chz.validate
    def _ranges(self) -> None:
        if self.base <= 1:
            raise UserError(f"base={self.base}: must be above 1")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction={self.fraction}: must be in (0, 1]")

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Turns x (..., t, h, k) by positions (..., t); angles in fp32."""
        turned = int(x.shape[-1] * self.fraction) // 2 * 2
        rates = self.base ** (-jnp.arange(0, turned, 2, dtype=jnp.float32) / turned)
        angles = positions[..., None, None].astype(jnp.float32) * rates
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        head, rest = x[..., :turned].astype(jnp.float32), x[..., turned:]
        if self.layout == "half":
            a, b = jnp.split(head, 2, axis=-1)
            head = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        else:
            a, b = head[..., 0::2], head[..., 1::2]
            head = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(head.shape)
        return jnp.concatenate([head.astype(x.dtype), rest], axis=-1)


@chz.chz(typecheck=True)
class LearnedPositions(PositionsConfig):
    """A learned vector a position, up to `maximum` of them. On the model it is added to the embedding (Radford et al.
    2019); on a mixer, to the input of the query and key projections only (Press, Smith & Lewis 2021, section 3.1)."""

    maximum: int = 2048

    @chz.validate
    def _positive(self) -> None:
        if self.maximum < 1:
            raise UserError(f"maximum={self.maximum}: needs at least one position")

    def build(self, width: int, rngs: nnx.Rngs) -> PositionTable:
        return PositionTable(self.maximum, width, rngs)


class PositionTable(nnx.Module):
    """What `LearnedPositions` builds: vectors by position."""

    def __init__(self, maximum: int, width: int, rngs: nnx.Rngs):
        self.table = parameter(normal()(rngs.params(), (maximum, width), jnp.float32))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Vectors (..., d) at positions (...); NaN past the table, so that a stream that runs over it is seen."""
        return self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)


def check_length(length: int, maximum: int, what: str) -> None:
    """Raises UserError when an input is longer than a configured maximum."""
    if length > maximum:
        raise UserError(f"an input of {length} tokens is longer than {what} of {maximum}")
