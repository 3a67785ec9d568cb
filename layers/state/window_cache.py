"""The decode cache of sliding windows: a ring of slots, and slots of their own for a document's first tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recollect.layers.mixer import Context, Cursor
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.layers.state.slot_writes import written
from recollect.pallas_kernels.mask_expressions import Mask, TokenFields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowCache(KeyValueCache):
    """Keys and values of the newest tokens: the newest one overwrites the oldest once all slots are taken.

    Attributes:
      count: tokens appended so far, without kept ones.
      kept: slots of the first tokens of the current document, before the others.
    """

    kept: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def capacity(self) -> None:
        """None: a stream of any length fits."""

    @classmethod
    def create(
        cls,
        batch_size: int,
        slots: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: Any,
        mask: Mask | None = None,
        kept: int = 0,
    ) -> WindowCache:
        """Returns an empty cache of `slots` slots and `kept` more for the first tokens of the current document."""
        sizes = (batch_size, kept + slots, heads, key_dim, value_dim)
        return cls(**vars(KeyValueCache.create(*sizes, dtype, mask)), kept=kept)

    def remember(
        self, keys: Float[Array, "b t g k"], values: Float[Array, "b t g v"], tokens: Context, cursor: Cursor
    ) -> tuple[Float[Array, "b s g k"], Float[Array, "b s g v"], TokenFields, WindowCache]:
        if keys.shape[1] == 1:  # it pushes out what it does not see, so nothing need be copied
            after = self.append(keys, values, tokens, cursor)
            return after.keys.astype(keys.dtype), after.values.astype(values.dtype), after.fields(), after
        # Read first, append after: a chunk longer than the ring would push out what its first tokens still see.
        assert tokens.positions is not None and tokens.segments is not None
        fields = TokenFields(
            jnp.concatenate([self.positions, tokens.positions], axis=1),
            jnp.concatenate([self.segments, tokens.segments], axis=1),
        )
        all_keys = jnp.concatenate([self.keys.astype(keys.dtype), keys], axis=1)
        all_values = jnp.concatenate([self.values.astype(values.dtype), values], axis=1)
        return all_keys, all_values, fields, self.append(keys, values, tokens, cursor)

    def append(
        self, keys: Float[Array, "b t g k"], values: Float[Array, "b t g v"], tokens: Context, cursor: Cursor
    ) -> WindowCache:
        """Returns the cache after new tokens; `tokens` and `cursor` are from `Cursor.read`. Padding takes no slot."""
        assert tokens.segments is not None and tokens.positions is not None
        end = self.keys.shape[1]
        slots = end - self.kept
        real = tokens.segments != 0
        valid = real & (tokens.positions >= self.kept)  # each token lives in one slot: kept ones stay out of the ring
        index = self.count[:, None] + jnp.cumsum(valid, axis=1) - 1
        total = self.count + jnp.sum(valid, axis=1, dtype=jnp.int32)
        # Of tokens that would share a slot only the newest is written: a scatter's order is not defined.
        newest = valid & (index >= total[:, None] - slots)
        updated = written(self, jnp.where(newest, self.kept + index % slots, end), keys, values, tokens)
        if self.kept:
            first = real & (tokens.positions < self.kept) & (tokens.segments == cursor.segment[:, None])
            updated = written(updated, jnp.where(first, tokens.positions, end), keys, values, tokens)
        return dataclasses.replace(updated, count=total, cursor=cursor)
