"""Selectors: which keys a query may see, by what they hold. One yields a mask per head; a mixer adds it to its scores.

A selector is a config; `build` returns its module, `selected(q, k, fields)` -> (b, h, t, s) bool. Causality, documents
and padding are the mixer's; a selector may say True for any key that those hide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recollect.configuration import Config, UserError, at_least


@chz.chz(typecheck=True)
class Selector(Config):
    """Base of the selectors."""

    def build(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> Any:
        """Returns what selects for so many heads of `dim` dimensions in a model of this width."""
        raise UserError(f"{type(self).__name__} selects nothing: name MeanBlocks")


@chz.chz(typecheck=True)
class MeanBlocks(Selector):
    """A query's own block, and the top - 1 earlier ones of its document whose mean key has the largest product with it,
    per head (Lu et al. 2025, MoBA, 2502.13189, equations 5 to 8; no parameters).

    Attributes:
      block: tokens of a block, counted within documents.
      top: blocks that a query sees, its own included.
    """

    block: int = chz.field(default=16, validator=at_least(1))
    top: int = chz.field(default=4, validator=at_least(1))

    def build(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> MeanBlocks:
        """Returns itself."""
        return self

    def selected(
        self, q: Float[Array, "b t h k"], k: Float[Array, "b s g k"], fields: Mapping[str, Any]
    ) -> Bool[Array, "b h t s"]:
        """Returns which keys a query may see; `fields` has positions and segments of queries and, of a cache, of keys
        (None: one document from its start)."""
        (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
        i, of_queries = (_field(fields, "query", name, q) for name in ("positions", "segments"))
        j, of_keys = (_field(fields, "key", name, k) for name in ("positions", "segments"))
        i, j = i // self.block, j // self.block
        real = of_keys != 0
        one_block = (j[:, :, None] == j[:, None]) & (of_keys[:, :, None] == of_keys[:, None]) & real[:, None]
        size = jnp.maximum(jnp.sum(one_block, axis=-1), 1)
        wide = jnp.promote_types(k.dtype, jnp.float32)
        means = jnp.einsum("bsz,bzgk->bsgk", one_block.astype(wide), k.astype(wide)) / size[:, :, None, None]
        scores = jnp.einsum("btgrk,bsgk->bgrts", q.reshape(b, t, g, h // g, -1).astype(wide), means).reshape(b, h, t, s)
        # The first key stored of each block stands for it.
        first = jnp.argmax(one_block, axis=-1)
        stands = (first == jnp.arange(s)) & real
        same = of_queries[:, :, None] == of_keys[:, None]
        earlier = same & (j[:, None] < i[:, :, None])
        own = same & (j[:, None] == i[:, :, None])
        if self.top == 1:
            return jnp.broadcast_to(own[:, None], scores.shape)
        open_ = (earlier & stands[:, None])[:, None]
        scores = jax.lax.stop_gradient(jnp.where(open_, scores, -jnp.inf))
        best = jax.lax.top_k(scores, min(self.top - 1, s))[1]
        chosen = jax.nn.one_hot(best, s, dtype=bool).any(axis=-2) & open_
        of_block = jnp.broadcast_to(first[:, None, None], chosen.shape)
        return own[:, None] | (jnp.take_along_axis(chosen, of_block, axis=-1) & earlier[:, None])


def _field(fields: Mapping[str, Any], side: str, name: str, x: jax.Array) -> jax.Array:
    """Returns a field (b, tokens); of keys that are the queries' tokens, theirs."""
    value = fields.get(f"{side}_{name}", fields.get(f"query_{name}"))
    if value is not None:
        return value
    plain = jnp.arange(x.shape[1]) if name == "positions" else jnp.ones(x.shape[1], jnp.int32)
    return jnp.broadcast_to(plain, x.shape[:2])
