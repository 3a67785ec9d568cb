"""Continuous inputs: vectors that stand among the tokens, as patches of an image do."""

from __future__ import annotations

import chz
import jax.nn
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.configuration import Config, UserError, at_least
from recollect.layers.context import Context
from recollect.layers.modules.linear import Linear
from recollect.pallas_kernels.mask_expressions import PERCEPT


@chz.chz(typecheck=True)
class Projector(Config):
    """Maps vectors to the model's width: one linear map, or two with GELU between them (Liu et al. 2023, LLaVA-1.5,
    section 3.2). They stand where tokens are of type PERCEPT, in place of these tokens' embeddings.

    Attributes:
      channels: of the vectors.
      hidden: dimensions between two maps; None: one map.
    """

    channels: int = chz.field(validator=at_least(1))
    hidden: int | None = chz.field(default=None, validator=at_least(1))

    def build(self, width: int, rngs: nnx.Rngs) -> ProjectorModule:
        """Returns the module for a model of this width."""
        return ProjectorModule(self, width, rngs)


class ProjectorModule(nnx.Module):
    """The module of `Projector`."""

    def __init__(self, config: Projector, width: int, rngs: nnx.Rngs):
        self.channels = config.channels
        self.inner = None if config.hidden is None else Linear(config.channels, config.hidden, "e f", rngs, bias=True)
        self.outer = Linear(config.hidden or config.channels, width, "f d" if config.hidden else "e d", rngs, bias=True)

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        """Returns the embedded tokens with the context's vectors in place of those of type PERCEPT.

        Raises:
          UserError: the context's vectors have other channels.
        """
        vectors, types = context.vectors, context.token_types
        if vectors is None or types is None:
            return x
        if vectors.shape != (*x.shape[:2], self.channels):
            fits = (*x.shape[:2], self.channels)
            raise UserError(f"vectors of shape {vectors.shape}: the model's projector takes {fits}")
        is_vector = (types == PERCEPT)[..., None]
        vectors = jnp.where(is_vector, vectors, 0).astype(x.dtype)
        y = self.outer(vectors if self.inner is None else jax.nn.gelu(self.inner(vectors)))
        return jnp.where(is_vector, y, x)
