"""The softmax family's decode cache: append new tokens, then read keys and values with the fields of each slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.layers.mixer import Context, Cursor
from recollect.layers.modules import masking
from recollect.layers.state.capacity import BoundedState
from recollect.layers.state.slot_writes import appended
from recollect.pallas_kernels.mask_expressions import Mask, TokenFields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache(BoundedState):
    """Keys (b, s, g, k) and values (b, s, g, v), or trees of (b, s, ...), in order of arrival, with the fields of each
    slot (segment 0 marks a free one). Tokens past the last slot are refused, inside jit dropped and counted
    (layers/state/capacity.py). Mixers that rotate after retrieval store keys unrotated. `count` tokens came so far.
    `further` has what the mixer's mask reads of them beside positions and segments."""

    keys: Any
    values: Any
    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]
    count: Int[Array, " b"]
    cursor: Cursor
    further: dict[str, Int[Array, "b s"]] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(
        cls, batch_size: int, slots: int, heads: int, key_dim: int, value_dim: int, dtype: Any, mask: Mask | None = None
    ) -> KeyValueCache:
        """Returns an empty cache, with the fields that `mask` reads."""
        further = () if mask is None else sorted(mask.fields - masking.GIVEN)
        return cls(
            keys=jnp.zeros((batch_size, slots, heads, key_dim), dtype),
            values=jnp.zeros((batch_size, slots, heads, value_dim), dtype),
            positions=jnp.zeros((batch_size, slots), jnp.int32),
            segments=jnp.zeros((batch_size, slots), jnp.int32),
            count=jnp.zeros(batch_size, jnp.int32),
            cursor=Cursor.start(batch_size),
            further={name: jnp.zeros((batch_size, slots), jnp.int32) for name in further},
        )

    def remember(
        self, keys: Any, values: Any, tokens: Context, cursor: Cursor
    ) -> tuple[Any, Any, TokenFields, KeyValueCache]:
        """Returns keys, values and fields that new tokens may see, old and new, in new ones' dtypes; and the cache
        after them."""
        after = self.append(keys, values, tokens, cursor)
        seen = jax.tree.map(lambda old, new: old.astype(new.dtype), (after.keys, after.values), (keys, values))
        return *seen, after.fields(), after

    def append(self, keys: Any, values: Any, tokens: Context, cursor: Cursor) -> KeyValueCache:
        """Returns the cache after new tokens; `tokens` and `cursor` are from `Cursor.read`. Padding takes no slot."""
        return appended(self, keys, values, tokens, cursor)

    def fields(self) -> TokenFields:
        """Returns the fields of each slot; free slots have segment 0."""
        return TokenFields(self.positions, self.segments)
