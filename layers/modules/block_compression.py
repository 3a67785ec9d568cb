"""What makes one vector of those of a block: native sparse attention's compressed keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recollect.layers.modules.linear import Linear, normal, parameter


class BlockCompression(nnx.Module):
    """phi: one vector of a block's, W_2 gelu(W_1 [x_1 + e_1 ... x_l + e_l])."""

    def __init__(self, block: int, dim: int, rngs: nnx.Rngs):
        self.places = parameter(jnp.zeros((block, dim)), "t k", decay=False)
        self.up = Linear(block * dim, dim, "k u", rngs, init=normal((block * dim) ** -0.5))
        self.down = Linear(dim, dim, "u k", rngs, init=normal(dim**-0.5))

    def __call__(self, x: Float[Array, "b n g l k"]) -> Float[Array, "b n g k"]:
        x = (x + self.places[...].astype(x.dtype)).reshape(*x.shape[:3], -1)
        return self.down(jax.nn.gelu(self.up(x)))
