"""Attention to keys that a selector picks by what they hold: MoBA and its like.

    o_i = sum over picked j of softmax_j(q_i . k_j / sqrt(k)) v_j        one softmax over all picked keys

Lu et al. 2025 (MoBA, 2502.13189) with the selector `MeanBlocks`: the query's own block and those whose mean key fits
best. Parameters are those of `Attention`, so that either can be made of the other. On every backend all scores are
computed and those of keys not picked hidden; the state keeps every key.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import chz
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import Context, MixerOutput, Place
from recollect.layers.mixers.attention import SoftmaxAttention, SoftmaxConfig
from recollect.layers.modules.selection import (
    hidden_bias,
    keys_read,
    selector_losses,
    selector_reads,
    token_indices,
    with_kept,
)
from recollect.layers.modules.selectors import MeanBlocks, Selector
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.reads import Reads
from recollect.pallas_kernels.softmax_attention import softmax_attention


@chz.chz(typecheck=True)
class BlockSelection(SoftmaxConfig):
    """Softmax attention to selected keys. State: every key and value.

    Attributes:
      retrieve: what selects.
    """

    NOT_SERVED: ClassVar[dict[str, str]] = {
        "causal": "its selectors pick among the blocks before a query",
        "cross": "its selectors pick among the blocks before a query, and the source has none",
        "design": "its selectors pick among the blocks before a query",
    }

    retrieve: Selector = MeanBlocks()

    def build(self, width: int, place: Place, rngs: nnx.Rngs) -> BlockSelectionAttention:
        return BlockSelectionAttention(self, width, place, rngs)


class BlockSelectionAttention(SoftmaxAttention):
    """The module of `BlockSelection`; its cache has what the selector keeps of each token beside its key."""

    def __init__(self, config: BlockSelection, width: int, place: Place, rngs: nnx.Rngs):
        super().__init__(config, width, place, rngs)
        self.selector = config.retrieve.build(width, config.heads, self.head_dim, rngs)

    def init_state(self, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> KeyValueCache:
        """Returns a cache of one slot per token."""
        return with_kept(super().init_state(batch_size, max_length, dtype), self.selector, self.query.kernel.shape[0])

    def _project(self, x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None, context: Context) -> Any:
        """Returns queries, keys with what the selector keeps of them, and values."""
        q, k, v = super()._project(x, positions, context)
        return q, (k, self.selector.keep(x, token_indices(x, positions))), v

    def _mix(self, x: jax.Array, q: jax.Array, k: Any, v: jax.Array, fields: dict[str, Any]) -> MixerOutput:
        k, kept = k
        read, positions = keys_read(self.selector, x, q, k, kept, fields), self._bias(x, q, k, fields)
        bias = hidden_bias(read) if positions is None else hidden_bias(read) + positions
        out = self._finish(softmax_attention(q, k, v, bias=bias, **self._seen(fields), **fields), x)
        losses = selector_losses(self.selector, x, q, k, kept, fields, read, self.head_dim**-0.5)
        return dataclasses.replace(out, losses=losses)

    def _reads(self, x: jax.Array, q: jax.Array, k: Any, v: jax.Array, fields: dict[str, Any]) -> Reads:
        k, kept = k
        read = keys_read(self.selector, x, q, k, kept, fields)
        return selector_reads(self.selector, read, q, k, fields, bias=self._bias(x, q, k, fields))
