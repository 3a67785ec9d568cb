"""What auxiliary losses and metrics are formed of: sums over tokens, so that pieces of a batch add up to the batch.

A mean over pieces is not the mean over tokens where pieces have different numbers of them, and a product of two means
(a balance loss) is no mean of the pieces' at all. Therefore the sums are added up, over the pieces of
`run.accumulate`, and losses and metrics are formed from the batch's sums once. Padding is in no sum.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

Values = dict[str, Float[Array, ""]]


class TokenSums:
    """Base of sums over the tokens that are not padding: a pytree whose arrays add up over the pieces of a batch."""

    def formed(self) -> tuple[Values, Values]:
        """Returns losses and metrics by name."""
        raise NotImplementedError

    def with_gradient_of(self, piece: Self) -> Self:
        """Returns the same values, through which gradients reach the part that a piece has in them."""
        return jax.tree.map(lambda whole, own: whole + (own - jax.lax.stop_gradient(own)), self, piece)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Means(TokenSums):
    """Losses and metrics that are means over tokens, times the number of tokens; and that number."""

    losses: Values
    metrics: Values
    tokens: Float[Array, ""]

    @classmethod
    def of(cls, losses: Values, metrics: Values, tokens: Float[Array, ""]) -> Means:
        """Returns the sums of means over so many tokens."""
        sums = [{name: value * tokens for name, value in values.items()} for values in (losses, metrics)]
        return cls(sums[0], sums[1], tokens)

    def formed(self) -> tuple[Values, Values]:
        number = jnp.maximum(self.tokens, 1)
        losses, metrics = (
            {name: total / number for name, total in totals.items()} for totals in (self.losses, self.metrics)
        )
        return losses, metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSums(TokenSums):
    """The sums of several layers; the arrays of each have a leading axis over layers of one kind."""

    layers: tuple[TokenSums, ...]

    def formed(self) -> tuple[Values, Values]:
        """Returns the means over the layers that have a loss or metric of a name."""
        found: tuple[dict[str, list[Any]], dict[str, list[Any]]] = ({}, {})
        for sums in self.layers:
            for values, lists in zip(jax.vmap(lambda one: one.formed())(sums), found, strict=True):
                for name, value in values.items():
                    lists.setdefault(name, []).append(value)
        losses, metrics = ({name: jnp.mean(jnp.concatenate(v)) for name, v in lists.items()} for lists in found)
        return losses, metrics


def number_of_tokens(x: Shaped[Array, "b t n"], segments: Int[Array, "b t"] | None) -> Float[Array, ""]:
    """Returns how many tokens `x` is of that are not padding."""
    if segments is None:
        return jnp.float32(x.shape[0] * x.shape[1])
    return jnp.sum(segments != 0, dtype=jnp.float32)


def sum_over_tokens(values: Shaped[Array, "b t n"], segments: Int[Array, "b t"] | None) -> Float[Array, " n"]:
    """Returns the sums over the tokens that are not padding, fp32."""
    values = values.astype(jnp.float32)
    return jnp.sum(values if segments is None else jnp.where((segments != 0)[..., None], values, 0), axis=(0, 1))
