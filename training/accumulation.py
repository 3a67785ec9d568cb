"""Gradients of a batch in parts, to fit memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.data.batch import Batch
from recollect.models.functional import Params


def accumulated(gradient: Callable[..., Any], params: Params, batch: Batch, key: jax.Array | None, count: int) -> Any:
    """Returns the sum of `gradient(params, part, key of the part)` over `count` parts of the batch."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    keys = None if key is None else jax.random.split(key, count)

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    first = jax.tree.map(lambda leaf: leaf[0], (parts, keys))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, params, *first))
    return jax.lax.scan(body, zeros, (parts, keys))[0]
