"""The softmax family's decode cache: append new tokens, then read keys and values with the fields of each slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import Context, Cursor
from recollect.pallas_kernels.masks import TokenFields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values in order of arrival.

    Attributes:
      keys, values: of each slot. Mixers that rotate after retrieval store keys unrotated.
      positions, segments: fields of each slot; segment 0 marks a free one.
      count: tokens appended so far, without kept ones.
      cursor: where the stream stands.
      kept: slots of the first tokens of the current document, before the others.
      ring: whether the newest token overwrites the oldest once all slots are taken (a window); else tokens past the
        last slot are dropped (`init_state` was asked for too short a stream).
    """

    keys: Float[Array, "b s g k"]
    values: Float[Array, "b s g v"]
    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]
    count: Int[Array, " b"]
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
        """Returns an empty cache of `slots` slots and `kept` more for the first tokens of the current document."""
        rows = (batch_size, kept + slots)
        return cls(
            keys=jnp.zeros((*rows, heads, key_dim), dtype),
            values=jnp.zeros((*rows, heads, value_dim), dtype),
            positions=jnp.zeros(rows, jnp.int32),
            segments=jnp.zeros(rows, jnp.int32),
            count=jnp.zeros(batch_size, jnp.int32),
            cursor=Cursor.start(batch_size),
            kept=kept,
            ring=ring,
        )

    def append(
        self, keys: Float[Array, "b t g k"], values: Float[Array, "b t g v"], tokens: Context, cursor: Cursor
    ) -> KeyValueCache:
        """Returns the cache after new tokens; `tokens` and `cursor` are from `Cursor.read`. Padding takes no slot."""
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
        """Returns the fields of each slot; free slots have segment 0."""
        return TokenFields(self.positions, self.segments)
