"""The softmax family's decode cache: append new tokens, then view keys and values with the fields of each slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recollect.layers.mixer import Context, Cursor
from recollect.pallas_kernels.masks import TokenFields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values in order of arrival.

    Attributes:
      keys, values: (b, s, h, k) and (b, s, h, v). Mixers that rotate after retrieval store keys unrotated.
      positions, segments: (b, s) int32; segment 0 marks a free slot.
      count: (b,) int32, tokens appended so far, kept ones apart.
      cursor: where the stream stands.
      ring: whether the newest token overwrites the oldest once all slots are taken (a window), or slots past the end
        drop tokens (then `init_state` was asked for too short a stream).
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array
    count: jax.Array
    cursor: Cursor
    kept: int = dataclasses.field(default=0, metadata={"static": True})
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch_size: int,
        slots: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: Any,
        *,
        ring: bool = False,
        kept: int = 0,
    ) -> KeyValueCache:
        """An empty cache of `slots` slots. It may keep the first `kept` tokens of the current document in slots of
        their own, before the others."""
        return cls(
            keys=jnp.zeros((batch_size, kept + slots, heads, key_dim), dtype),
            values=jnp.zeros((batch_size, kept + slots, heads, value_dim), dtype),
            positions=jnp.zeros((batch_size, kept + slots), jnp.int32),
            segments=jnp.zeros((batch_size, kept + slots), jnp.int32),
            count=jnp.zeros(batch_size, jnp.int32),
            cursor=Cursor.start(batch_size),
            kept=kept,
            ring=ring,
        )

    def append(self, keys: jax.Array, values: jax.Array, tokens: Context, cursor: Cursor) -> KeyValueCache:
        """The cache after new tokens, keys (b, t, h, k); `tokens` and `cursor` come from `Cursor.read`. Padding
        takes no slot."""
        assert tokens.segments is not None and tokens.positions is not None
        slots = self.keys.shape[1] - self.kept
        real = tokens.segments != 0
        valid = real & (tokens.positions >= self.kept)  # each token lives in one slot: kept ones stay out of the ring
        order = jnp.cumsum(valid, axis=1) - 1
        total = self.count + jnp.sum(valid, axis=1, dtype=jnp.int32)
        index = self.count[:, None] + order
        if self.ring:
            # Of tokens that would share a slot only the newest is written: a scatter's order is not defined.
            newest = index >= (total[:, None] - slots)
            index = jnp.where(newest, index % slots, slots)
        index = jnp.where(valid & (index < slots), index + self.kept, self.kept + slots)
        updated = self._write(index, keys, values, tokens)
        if self.kept:
            first = real & (tokens.positions < self.kept) & (tokens.segments == cursor.segment[:, None])
            updated = updated._write(jnp.where(first, tokens.positions, self.kept + slots), keys, values, tokens)
        return dataclasses.replace(updated, count=total, cursor=cursor)

    def _write(self, index: jax.Array, keys: jax.Array, values: jax.Array, tokens: Context) -> KeyValueCache:
        assert tokens.segments is not None and tokens.positions is not None
        rows = jnp.arange(index.shape[0])[:, None]

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, index].set(new.astype(old.dtype), mode="drop")

        return dataclasses.replace(
            self,
            keys=put(self.keys, keys),
            values=put(self.values, values),
            positions=put(self.positions, tokens.positions),
            segments=put(self.segments, tokens.segments),
        )

    def fields(self) -> TokenFields:
        """Fields of each slot; free slots have segment 0."""
        return TokenFields(self.positions, self.segments)
