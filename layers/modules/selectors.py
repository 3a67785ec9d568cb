"""Selectors: which keys a query reads, by what they hold. One yields a schedule of blocks of keys
(pallas_kernels/key_schedule.py) for each query and group of heads.

A selector is a config; `build` returns its module, `schedule(x, q, k, kept, fields)` its schedule. What it keeps of
each token beside the mixer's keys comes from `keep(x, positions)`. Causality, documents and padding are the mixer's; a
schedule may hold any key that those hide. Landmark's retrieval takes its blocks from one, too.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import chz
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recollect.configuration import Config, at_least
from recollect.layers.modules.positions import Placement
from recollect.pallas_kernels.key_schedule import (
    KeyBlocks,
    KeySchedule,
    best_blocks,
    complete_blocks,
    earlier_blocks,
    slices,
)
from recollect.pallas_kernels.landmark_attention import landmark_schedule

Fields = Mapping[str, Any]
"""query_positions, query_segments (b, t), key_positions and key_segments (b, s), all of them: `complete_fields`."""


class SelectorModule:
    """Base of what selects. What derives from it takes arguments of the same shapes."""

    def keep(self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"]) -> Any:
        """Returns what the selector needs of each token later, (b, t, ...), or None."""
        return None

    def schedule(
        self,
        x: Float[Array, "b t d"],
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s g k"],
        kept: Any,
        fields: Fields,
    ) -> KeySchedule:
        """Returns the blocks that each query reads. `x` is the mixer's input, `kept` what `keep` returned of each
        key."""
        raise NotImplementedError

    def candidates(self, fields: Fields) -> tuple[KeyBlocks, Bool[Array, "b t n"]]:
        """Returns the blocks that are scored, and which of them for each query."""
        raise NotImplementedError

    def number_scored(self, fields: Fields) -> Int[Array, "b t"]:
        """Returns how many vectors, one per block, each query reads to choose by."""
        return jnp.sum(self.candidates(fields)[1], axis=2)

    def loss(
        self,
        x: Float[Array, "b t d"],
        kept: Any,
        weights: Float[Array, "b t s"],
        read: Bool[Array, "b t s"],
        fields: Fields,
    ) -> Float[Array, ""]:
        """Returns the loss by which a selector with parameters is trained, a mean over tokens, from the mixer's
        weights, averaged over heads, on the keys that were read."""
        raise NotImplementedError


@chz.chz(typecheck=True)
class Selector(Config):
    """Base of the selectors."""

    @abc.abstractmethod
    def build(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> Any:
        """Returns what selects for so many heads of `dim` dimensions in a model of this width."""


@chz.chz(typecheck=True)
class MeanBlocks(Selector, SelectorModule):
    """A query's own block, and the top - 1 earlier ones of its document whose mean key has the largest product with it,
    per head (Lu et al. 2025, MoBA, 2502.13189, equations 5 to 8; no parameters).

    Attributes:
      block: tokens of a block, counted within documents.
      top: blocks that a query reads, its own included.
    """

    block: int = chz.field(default=16, validator=at_least(1))
    top: int = chz.field(default=4, validator=at_least(1))

    def build(self, width: int, heads: int, dim: int, rngs: nnx.Rngs) -> MeanBlocks:
        """Returns itself."""
        return self

    def candidates(self, fields: Fields) -> tuple[KeyBlocks, Bool[Array, "b t n"]]:
        """Returns the complete blocks, and which are before each query's own."""
        blocks = complete_blocks(fields["key_positions"], fields["key_segments"], self.block)
        return blocks, earlier_blocks(blocks, fields["query_positions"] // self.block, fields["query_segments"])

    def schedule(self, x, q, k, kept: Any, fields: Fields) -> KeySchedule:
        """Returns the earlier blocks that each query and head reads besides its own."""
        (b, t, h, dim), g = q.shape, k.shape[2]
        blocks, earlier = self.candidates(fields)
        wide = jnp.promote_types(k.dtype, jnp.float32)
        means = jnp.mean(block_slices(k, blocks.start, self.block).astype(wide), axis=2)
        means = jnp.where(blocks.exists[:, :, None, None], means, 0)
        scores = jnp.einsum("btgrk,bngk->btgrn", q.reshape(b, t, g, h // g, dim).astype(wide), means)
        picked = best_blocks(scores.reshape(b, t, h, -1), earlier[:, :, None], self.top - 1)
        return KeySchedule(blocks, *picked, self.block)


class LandmarkTokens(SelectorModule):
    """The blocks whose landmark fits each query best, per head, of unrotated queries and keys: Landmark's retrieval."""

    def __init__(self, block: int, top: int, window: int, positions: Placement | None):
        self.settings: dict[str, Any] = {"block": block, "top": top, "window": window}
        self.rotate = (lambda x, positions: x) if positions is None else positions.rotate

    def schedule(self, x, q, k, kept: Any, fields: Fields) -> KeySchedule:
        """Returns the blocks before each query's window that it reads."""
        return landmark_schedule(q, k, rotate=self.rotate, **self.settings, **fields)


def block_slices(x: Float[Array, "b s *rest"], start: Int[Array, "b n"], size: int) -> Float[Array, "b n c *rest"]:
    """Returns the `size` keys from each start on; of what ends behind the last key the end is meaningless."""
    short = max(0, size - x.shape[1])
    return slices(jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)), start, size)


def complete_fields(fields: Mapping[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Returns positions and segments of queries and keys, from those that a softmax mixer has: None is one document
    from its start, and where keys have none they are the queries' tokens."""
    positions, segments = fields["query_positions"], fields["query_segments"]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    if segments is None:
        segments = jnp.ones((rows, length), jnp.int32)
    of_queries = {"query_positions": positions, "query_segments": segments}
    of_keys = {name.replace("query", "key"): field for name, field in of_queries.items()}
    return of_queries | {name: fields.get(name, field) for name, field in of_keys.items()}
