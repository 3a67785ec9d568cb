"""Dropout: what is dropped follows from the key of a step, (seed, step), and the layer; nothing in evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from recollect.configuration import requires

is_share = requires(lambda value: 0 <= value < 1, "must be in [0, 1)")
"""The validator of shares."""


def dropped(x: Float[Array, "*rows d"], share: float, key: Key[Array, ""]) -> Float[Array, "*rows d"]:
    """Returns x with this share of its elements zeroed, and the others grown to keep its mean (Srivastava et al.
    2014)."""
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0)


def kept_weights(
    x: Float[Array, "b t d"], heads: int, share: float, key: Key[Array, ""], keys: int | None = None
) -> Float[Array, "b h t s"]:
    """Returns the factors of the softmax weights of tokens on each other, or on so many keys: 0, or 1 / (1 - share)."""
    b, t, _ = x.shape
    return dropped(jnp.ones((b, heads, t, t if keys is None else keys)), share, key)


def layer_keys(key: Key[Array, ""], first: int, repeats: int, period: int) -> Key[Array, "n p"]:
    """Returns the keys of `repeats` times `period` layers, the first of which is number `first` of the model."""
    numbers = first + jnp.arange(repeats * period).reshape(repeats, period)
    return jax.vmap(jax.vmap(lambda number: jax.random.fold_in(key, number)))(numbers)
