"""Writing new tokens into the slots of a key-value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recollect.layers.mixer import Context, Cursor
from recollect.layers.modules import masking
from recollect.layers.state.capacity import check_capacity


def appended(cache: Any, keys: Any, values: Any, tokens: Context, cursor: Cursor) -> Any:
    """Returns a `KeyValueCache` after new tokens, in order of arrival; see there."""
    assert tokens.segments is not None
    check_capacity(cache, tokens.segments)
    slots = cache.segments.shape[1]
    valid = tokens.segments != 0
    index = cache.count[:, None] + jnp.cumsum(valid, axis=1) - 1
    updated = written(cache, jnp.where(valid & (index < slots), index, slots), keys, values, tokens)
    return dataclasses.replace(updated, count=cache.count + jnp.sum(valid, axis=1, dtype=jnp.int32), cursor=cursor)


def written(cache: Any, index: jax.Array, keys: Any, values: Any, tokens: Context) -> Any:
    """Returns a `KeyValueCache` with new tokens (b, t) at the slots `index` (b, t); those past the last are dropped."""
    assert tokens.segments is not None and tokens.positions is not None
    rows, slots = jnp.arange(index.shape[0])[:, None], cache.segments.shape[1]
    # Each token has a place of its own, those that are dropped past the end: no write need be atomic on a GPU.
    index = jnp.where(index < slots, index, slots + jnp.arange(index.shape[1]))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, index].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return dataclasses.replace(
        cache,
        keys=jax.tree.map(put, cache.keys, keys),
        values=jax.tree.map(put, cache.values, values),
        positions=put(cache.positions, tokens.positions),
        segments=put(cache.segments, tokens.segments),
        further=jax.tree.map(put, cache.further, masking.given(cache.further, tokens)),
    )
