"""Position-wise networks between mixers. A model without one sets `mlp=None`."""

from __future__ import annotations

import chz
import jax
from flax import nnx

from recollect.configuration import Config, UserError
from recollect.layers.mixer import Place
from recollect.layers.modules.linear import Linear, output_init


@chz.chz(typecheck=True)
class MlpConfig(Config):
    """Base of the MLPs' configs. `hidden` is the inner width; None takes `expansion` times the model width."""

    hidden: int | None = None
    expansion: float = 4.0
    bias: bool = False

    @chz.validate
    def _sizes(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden={self.hidden}: an MLP needs at least one hidden unit")
        if self.expansion <= 0:
            raise UserError(f"expansion={self.expansion}: must be positive")

    def inner(self, width: int) -> int:
        return self.hidden if self.hidden is not None else max(1, round(self.expansion * width))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> nnx.Module:
        raise NotImplementedError


@chz.chz(typecheck=True)
class GELU(MlpConfig):
    """W2 gelu(W1 x), exact gelu (Hendrycks & Gimpel 2016)."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GELUNetwork:
        return GELUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class SwiGLU(MlpConfig):
    """W3 (silu(W1 x) * W2 x) (Shazeer 2020, equation 6)."""

    expansion: float = 8 / 3

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SwiGLUNetwork:
        return SwiGLUNetwork(self, width, place, rngs)


class GELUNetwork(nnx.Module):
    """What `GELU` builds, x (..., d) -> (..., d)."""

    def __init__(self, config: MlpConfig, width: int, place: Place, rngs: nnx.Rngs):
        inner = config.inner(width)
        self.up = Linear(width, inner, rngs, bias=config.bias)
        self.down = Linear(inner, width, rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class SwiGLUNetwork(nnx.Module):
    """What `SwiGLU` builds, x (..., d) -> (..., d)."""

    def __init__(self, config: MlpConfig, width: int, place: Place, rngs: nnx.Rngs):
        inner = config.inner(width)
        self.gate = Linear(width, inner, rngs, bias=config.bias)
        self.up = Linear(width, inner, rngs, bias=config.bias)
        self.down = Linear(inner, width, rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
