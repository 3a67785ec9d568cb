"""The decode state of a mixer with a cache policy, and how many keys the newest token read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import Cursor
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes
from recollect.layers.state.capacity import BoundedState
from recollect.layers.state.key_value_cache import KeyValueCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState(BoundedState):
    """What a policy keeps, and where the stream stands.

    Attributes:
      cache: the policy's own.
      count: tokens given so far.
      keys_read: of the newest token, where tokens come one by one: a mean over key heads.
      room: tokens that a row takes; None: any number.
    """

    cache: Any
    count: Int[Array, " b"]
    cursor: Cursor
    keys_read: Float[Array, " b"]
    room: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int | None:
        return self.room

    @classmethod
    def create(cls, policy: CachePolicy, sizes: CacheSizes) -> PolicyState:
        """Returns the state before any token."""
        b = sizes.batch_size
        cursor, none = Cursor.start(b), jnp.zeros(b)
        return cls(policy.init(sizes), none.astype(jnp.int32), cursor, keys_read=none, room=policy.capacity(sizes))


def keys_read(states: Any) -> Float[Array, " b"] | float:
    """Returns the keys that the newest token of each row read, where tokens come one by one: a mean over key heads,
    summed over the layers of a model's states. Layers without keys read none; a cache without a policy is read whole.
    """

    def is_cache(part: Any) -> bool:
        return isinstance(part, PolicyState | KeyValueCache)

    total: Any = 0.0
    for part in jax.tree.leaves(states, is_leaf=is_cache):
        if isinstance(part, PolicyState):
            total = total + part.keys_read
        elif isinstance(part, KeyValueCache):
            total = total + jnp.sum(part.segments != 0, axis=-1, dtype=jnp.float32)
    return total
