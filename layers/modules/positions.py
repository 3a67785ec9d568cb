"""Positions of tokens, for mixers and for the embedding.

A scheme acts in one of three places: on the vectors that queries and keys are projected from, on queries and keys, or
on their scores (score_biases.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.configuration import Config, UserError, requires
from recollect.layers.modules.linear import embedding_init, parameter
from recollect.layers.modules.rotary_scaling import RotaryScaling


class Placement:
    """What positions do in softmax attention; nothing, but for what a scheme overrides."""

    def place(self, x: Float[Array, "b t d"], positions: Int[Array, "*#b t"]) -> Float[Array, "b t d"]:
        """Returns the input of the query and key projections."""
        return x

    def rotate(self, x: Float[Array, "*b t h k"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t h k"]:
        """Returns queries or keys with their positions in them."""
        return x

    def bias(self, q: Float[Array, "b t h k"], k: Float[Array, "b s g k"], fields: Mapping[str, Any]) -> Any:
        """Returns what is added to scores, (1 or b, h, t, s), or None; `fields` has query_positions and, of a cache,
        key_positions (None: 0, 1, ...)."""
        return None


@chz.chz(typecheck=True)
class PositionsConfig(Config, Placement):
    """Base of the position schemes. Those without parameters are their own modules."""

    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> Any:
        """Returns what acts in a mixer of so many heads of `dim` dimensions, in a model of this width; raises UserError
        where it does not fit them."""
        return self


@chz.chz(typecheck=True)
class Rotary(PositionsConfig):
    """Rotary positions (Su et al. 2021, equation 34): pairs of dimensions of q and k are rotated by the
    angle position * base^(-2i/r).

    `fraction` of each head's dimensions are rotated (rounded down to an even number); `layout` states which dimensions
    form a pair: "half" (i with i + r/2) or "interleaved" (2i with 2i + 1); `scaling` changes the rates for contexts
    longer than those of training (rotary_scaling.py).
    """

    base: float = chz.field(default=10_000.0, validator=requires(lambda value: value > 1, "must be above 1"))
    fraction: float = chz.field(default=1.0, validator=requires(lambda value: 0 < value <= 1, "must be in (0, 1]"))
    layout: Literal["half", "interleaved"] = "half"
    scaling: RotaryScaling | None = None

    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> Rotary:
        """Returns itself; raises UserError where a head of `dim` dimensions has no pair to rotate."""
        if int(dim * self.fraction) < 2:
            raise UserError(f"Rotary(fraction={self.fraction}) rotates pairs of dimensions: too few of a head's {dim}")
        return self

    def rotate(self, x: Float[Array, "*b t h k"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t h k"]:
        """Returns queries or keys rotated by their positions."""
        return self(x, positions)

    def __call__(self, x: Float[Array, "*b t h k"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t h k"]:
        """Returns x rotated by its positions; angles in fp32."""
        rotated = int(x.shape[-1] * self.fraction) // 2 * 2
        rates = self.base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
        amplitude = 1.0
        if self.scaling is not None:
            rates, amplitude = jnp.asarray(self.scaling.rates(self.base, rotated)), self.scaling.amplitude
        angles = positions[..., None, None].astype(jnp.float32) * rates
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if amplitude != 1:
            cos, sin = cos * amplitude, sin * amplitude
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

    def build_in(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> PositionTable:
        """Returns the table for a mixer."""
        return self.build(width, rngs)


class PositionTable(nnx.Module, Placement):
    """The module of `LearnedPositions`: vectors by position."""

    def __init__(self, maximum: int, width: int, rngs: nnx.Rngs):
        self.table = parameter(embedding_init()(rngs.params(), (maximum, width), jnp.float32), "t d")

    def __call__(self, positions: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """Returns the vectors at `positions`; NaN past the table, so that a stream that runs over it is noticed."""
        return self.table[...].at[positions].get(mode="fill", fill_value=jnp.nan)

    def place(self, x: Float[Array, "b t d"], positions: Int[Array, "*#b t"]) -> Float[Array, "b t d"]:
        """Returns x with the vectors at its positions added."""
        return x + self(positions).astype(x.dtype)


class LRPE(nnx.Module):
    """Linearised relative positions with a rate per head and dimension, learned (Qin et al. 2023, TransNormerLLM,
    section 3.1.1, "cosine" form).

        f(x, t) = [x cos(t theta), x sin(t theta)],     f(q, t) . f(k, s) = sum_j q_j k_j cos((t - s) theta_j)

    Queries and keys have twice the dimensions after it; with a recurrence's decay beside it, it is LRPE-d. At the start
    theta_j = base^(-2 j / (heads dim)), j counted over all heads: the authors' code.
    """

    def __init__(self, heads: int, dim: int, base: float = 10_000.0):
        rates = base ** (-2.0 * jnp.arange(heads * dim, dtype=jnp.float32) / (heads * dim))
        self.theta = parameter(rates.reshape(heads, dim), "h k", decay=False)

    def __call__(self, x: Float[Array, "*b t h k"], positions: Int[Array, "*#b t"]) -> Float[Array, "*b t h longer"]:
        """Returns queries or keys with their positions in them; angles in fp32."""
        angles = positions[..., None, None].astype(jnp.float32) * self.theta[...]
        y = x.astype(jnp.float32)
        return jnp.concatenate([y * jnp.cos(angles), y * jnp.sin(angles)], axis=-1).astype(x.dtype)
