"""Attention to keys that a selector picks by what they hold: MoBA and its like.

    o_i = sum over picked j of softmax_j(q_i . k_j / sqrt(k)) v_j        one softmax over all picked keys

Lu et al. 2025 (MoBA, 2502.13189) with the selector `MeanBlocks`: the query's own block and those whose mean key fits
best. Parameters are those of `Attention`, so that either can be made of the other. On every backend all scores are
computed and those of keys not picked hidden; the state keeps every key.
"""

from __future__ import annotations

from typing import Any

import chz
import jax
import jax.numpy as jnp
from flax import nnx

from recollect.layers.mixer import Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.selectors import MeanBlocks, Selector


@chz.chz(typecheck=True)
class BlockSelection(SoftmaxConfig):
    """Softmax attention to selected keys. State: every key and value.

    Attributes:
      retrieve: what selects.
    """

    retrieve: Selector = MeanBlocks()

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> BlockSelectionAttention:
        return BlockSelectionAttention(self, width, place, rngs)


class BlockSelectionAttention(SoftmaxAttention):
    """The module of `BlockSelection`."""

    def __init__(self, config: BlockSelection, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.selector = config.retrieve.build(width, config.heads, self.head_dim, rngs)

    def _bias(self, x: jax.Array, q: jax.Array, k: jax.Array, fields: dict[str, Any]) -> jax.Array:
        hidden = jnp.where(self.selector.selected(q, k, fields), 0.0, -jnp.inf)
        by_position = super()._bias(x, q, k, fields)
        return hidden if by_position is None else hidden + by_position
