"""The decode state of a mixer with a cache policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from recollect.layers.mixer import Cursor
from recollect.layers.state.cache_policy import CachePolicy, CacheSizes
from recollect.layers.state.capacity import BoundedState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState(BoundedState):
    """What a policy keeps, and where the stream stands.

    Attributes:
      cache: the policy's own.
      count: tokens given so far.
      room: tokens that a row takes; None: any number.
    """

    cache: Any
    count: Int[Array, " b"]
    cursor: Cursor
    room: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int | None:
        return self.room

    @classmethod
    def create(cls, policy: CachePolicy, sizes: CacheSizes) -> PolicyState:
        """Returns the state before any token."""
        b = sizes.batch_size
        return cls(policy.init(sizes), jnp.zeros(b, jnp.int32), Cursor.start(b), policy.capacity(sizes))
