"""What softmax mixers with a selector (selectors.py) share: cache, mask, and the loss that trains the selector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recollect.layers.modules.selectors import SelectorModule, complete_fields
from recollect.layers.state.key_value_cache import KeyValueCache
from recollect.pallas_kernels.masks import Causal, SameSegment, TokenFields


def token_indices(x: Float[Array, "b t d"], positions: Int[Array, "b t"] | None) -> Int[Array, "#b t"]:
    """Returns positions; 0, 1, ... where there are none."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions


def with_kept(cache: KeyValueCache, selector: SelectorModule, width: int) -> KeyValueCache:
    """Returns an empty cache with room for what the selector keeps of each token, beside its key."""
    token = jax.ShapeDtypeStruct((*cache.segments.shape, width), cache.values.dtype)
    shapes = jax.eval_shape(lambda x: selector.keep(x, cache.positions), token)
    kept = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
    return dataclasses.replace(cache, keys=(cache.keys, kept))


def keys_read(
    selector: SelectorModule,
    x: Float[Array, "b t d"],
    q: Float[Array, "b t h k"],
    k: Any,
    kept: Any,
    fields: Mapping[str, Any],
) -> Bool[Array, "#b #h t s"]:
    """Returns which keys each query and head reads, beside those that causality, documents and padding hide.
    `k` is what the selector takes for keys."""
    complete = complete_fields(fields, *x.shape[:2])
    read = selector.schedule(x, q, k, kept, complete).mask(**complete)
    return read if read.shape[1] == 1 else jnp.repeat(read, q.shape[2] // read.shape[1], axis=1)


def hidden_bias(read: Bool[Array, "#b #h t s"]) -> Float[Array, "#b #h t s"]:
    """Returns what hides the keys that are not read when it is added to scores."""
    return jnp.where(read, 0.0, -jnp.inf)


def selector_losses(
    selector: SelectorModule,
    x: Float[Array, "b t d"],
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    kept: Any,
    fields: Mapping[str, Any],
    read: Bool[Array, "#b #h t s"],
    scale: float,
) -> dict[str, Float[Array, ""]]:
    """Returns the selector's loss by name, of whole sequences; none of a selector without parameters."""
    if not isinstance(selector, nnx.Module) or "key_positions" in fields:
        return {}
    complete = complete_fields(fields, *x.shape[:2])
    tokens = TokenFields(complete["query_positions"], complete["query_segments"])
    seen = read & (Causal() & SameSegment()).dense(tokens, tokens)[:, None]
    q, k = (jax.lax.stop_gradient(y.astype(jnp.float32)) for y in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) * scale, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen.any(-1, keepdims=True), scores, 0), axis=-1), 0)
    return {"selector": selector.loss(x, kept, jnp.mean(weights, axis=1), jnp.any(seen, axis=1), complete)}
