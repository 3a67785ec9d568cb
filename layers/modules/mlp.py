"""Position-wise networks (MLPs) between mixers. A model without one sets `mlp=None`; one that adds its second norm to
the stream, `PassThrough`."""

from __future__ import annotations

import abc

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import Config, UserError, at_least, requires
from recollect.layers.mixer import Place
from recollect.layers.modules.linear import Linear, output_init


@chz.chz(typecheck=True)
class MlpConfig(Config):
    """Base of the MLPs' configs. `hidden` is the inner width; None takes `expansion` times the model width."""

    hidden: int | None = chz.field(default=None, validator=at_least(1))
    expansion: float = chz.field(default=4.0, validator=requires(lambda value: value > 0, "must be positive"))
    bias: bool = False

    def inner(self, width: int) -> int:
        """Returns the inner width in a model of this width."""
        return self.hidden if self.hidden is not None else max(1, round(self.expansion * width))

    @abc.abstractmethod
    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the network for a model of this width."""


@chz.chz(typecheck=True)
class GELU(MlpConfig):
    """W2 gelu(W1 x), exact gelu (Hendrycks & Gimpel 2016)."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GELUNetwork:
        return GELUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class SquaredReLU(MlpConfig):
    """W2 relu(W1 x)^2 (So et al. 2021, Primer, section 4.1); RWKV-7's channel mixing without its token shift."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SquaredReLUNetwork:
        return SquaredReLUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class SwiGLU(MlpConfig):
    """W3 (silu(W1 x) * W2 x) (Shazeer 2020, equation 6)."""

    expansion: float = chz.field(default=8 / 3, validator=requires(lambda value: value > 0, "must be positive"))

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SwiGLUNetwork:
        return SwiGLUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class GeGLU(SwiGLU):
    """W3 (gelu(W1 x) * W2 x) (Shazeer 2020, equation 6), gelu by its tanh form, as in Griffin's code."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> GeGLUNetwork:
        return GeGLUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class SGLU(SwiGLU):
    """W3 (W1 x * W2 x), without an activation (Qin et al. 2023, TransNormerLLM, section 3.1.3)."""

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> SGLUNetwork:
        return SGLUNetwork(self, width, place, rngs)


@chz.chz(typecheck=True)
class PassThrough(MlpConfig):
    """y = x: a block adds the second norm of its stream to the stream. Zoology's and Based's recall models have it
    (`state_mixer=Identity` inside a pre-norm block); it has no parameters beside that norm's."""

    @chz.validate
    def _nothing_to_set(self) -> None:
        if self.hidden is not None or self.bias:
            raise UserError("PassThrough has neither hidden units nor biases: leave hidden and bias as they are")

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> PassThroughNetwork:
        return PassThroughNetwork()


class PassThroughNetwork(nnx.Module):
    """The module of `PassThrough`."""

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return x


class GELUNetwork(nnx.Module):
    """The module of `GELU`."""

    def __init__(self, config: MlpConfig, width: int, place: Place, rngs: nnx.Rngs):
        inner = config.inner(width)
        self.up = Linear(width, inner, "d f", rngs, bias=config.bias)
        self.down = Linear(inner, width, "f d", rngs, bias=config.bias, init=output_init(place.depth))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class SquaredReLUNetwork(GELUNetwork):
    """The module of `SquaredReLU`: the same two maps."""

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


class SwiGLUNetwork(GELUNetwork):
    """The module of `SwiGLU`: the two maps and a gate, with its activation."""

    def __init__(self, config: MlpConfig, width: int, place: Place, rngs: nnx.Rngs):
        self.gate = Linear(width, config.inner(width), "d f", rngs, bias=config.bias)
        super().__init__(config, width, place, rngs)

    def activation(self, x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
        """Returns what multiplies W2 x, from W1 x."""
        return jax.nn.silu(x)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class GeGLUNetwork(SwiGLUNetwork):
    """The module of `GeGLU`."""

    def activation(self, x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
        return jax.nn.gelu(x)


class SGLUNetwork(SwiGLUNetwork):
    """The module of `SGLU`."""

    def activation(self, x: Float[Array, "*rows f"]) -> Float[Array, "*rows f"]:
        return x
