"""Parameters, with the tags that sharding and optimizers read, and the linear map."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Initializer = Any
"""`initializer(key, shape, dtype)`, as in jax.nn.initializers."""

STATED: contextvars.ContextVar[Any] = contextvars.ContextVar("initialisation", default=None)
"""The `Initialisation` of the model that is being built (initialisation.py); None: the project's."""


@contextlib.contextmanager
def initialised_by(stated: Any) -> Iterator[None]:
    """Builds what is built inside with an `Initialisation`, or None."""
    token = STATED.set(stated)
    try:
        yield
    finally:
        STATED.reset(token)


def normal(stddev: float = 0.02) -> Initializer:
    """Returns the initializer N(0, stddev)."""
    return jax.nn.initializers.normal(stddev)


def matrix_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws N(0, 0.02), or what the model's config states for matrices."""
    return (normal() if (stated := STATED.get()) is None else stated.matrix())(key, shape, dtype)


def output_init(depth: int) -> Initializer:
    """Returns N(0, 0.02 / sqrt(2 depth)), for projections that write to the residual stream (Radford et al. 2019,
    section 2.3), or what the model's config states for them."""
    return normal(0.02 / (2 * depth) ** 0.5) if (stated := STATED.get()) is None else stated.output(depth)


def embedding_init() -> Initializer:
    """Returns N(0, 0.02), or what the model's config states for vectors of tokens and positions."""
    return normal(0.02 if (stated := STATED.get()) is None else stated.embedding)


def parameter(
    value: Float[Array, "..."],
    dims: str,
    *,
    decay: bool | None = None,
    group: str = "default",
    trainable: bool = True,
) -> nnx.Param:
    """Returns an fp32 parameter with the tags that sharding and optimizers read.

    Args:
      dims: what each dimension counts, one word per dimension, blanks between. A word is a letter, or several whose
        dimensions are flattened into one ("d hk": model width to heads times key dims). Besides the letters of
        layers/mixer.py: f channels or hidden units inside a layer, w taps of a short filter, t positions or taps by
        position, z words of the vocabulary, r choices of a router or levels of a tree, l rank of a low-rank update, e
        features of time, u hidden units of a filter's network, or a low-rank map's. How each letter is split:
        training/sharding.py.
      decay: whether weight decay applies (it can be forced on all parameters, see `AdamW.decay_everything`). None:
        to matrices, and not to vectors (gains, biases).
      group: name of its learning-rate group.
      trainable: False for constants that travel with the weights (a fixed decay per head, say).

    Raises:
      ValueError: `dims` has not one word per dimension.
    """
    if len(dims.split()) != value.ndim:
        raise ValueError(f"dims={dims!r} has {len(dims.split())} words for the {value.ndim} dimensions of a parameter")
    decay = value.ndim > 1 if decay is None else decay
    return nnx.Param(value.astype(jnp.float32), dims=dims, decay=decay, group=group, trainable=trainable)


def split_heads(x: Float[Array, "b t hk"], heads: int) -> Float[Array, "b t h k"]:
    """Returns x with its last dimension split into `heads` heads."""
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: Float[Array, "b t h k"]) -> Float[Array, "b t hk"]:
    """Returns x with its heads flattened into one dimension."""
    return x.reshape(*x.shape[:2], -1)


class Linear(nnx.Module):
    """y = x W + b, W (in, out): parameters fp32, computed in x's dtype. `dims` are the letters of W; `tags` are those
    of `parameter`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dims: str,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        init: Initializer = matrix_init,
        **tags: Any,
    ):
        self.kernel = parameter(init(rngs.params(), (inputs, outputs), jnp.float32), dims, **tags)
        self.bias = parameter(jnp.zeros(outputs), dims.split()[1], **tags) if bias else None

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
