"""What softmax mixers with a selector (selectors.py) share: cache, mask, what is read while they stream, and the loss
that trains the selector."""

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
from recollect.layers.state.reads import Reads, mass_kept
from recollect.pallas_kernels.masks import Causal, SameSegment, TokenFields
from recollect.pallas_kernels.softmax_attention import softmax_attention


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


def number_read(read: Bool[Array, "#b #h t s"], key_heads: int, fields: Mapping[str, Any]) -> Float[Array, "b t"]:
    """Returns how many keys each query reads per key head, a mean over these: those that a query head of it reads and
    that are not hidden anyway. `fields` are those of streamed tokens and of the keys in their cache."""
    tokens = TokenFields(fields["query_positions"], fields["query_segments"])
    keys = TokenFields(fields["key_positions"], fields["key_segments"])
    seen = read & (Causal() & SameSegment()).dense(tokens, keys)[:, None]
    groups = min(key_heads, read.shape[1])
    by_group = jnp.any(seen.reshape(len(seen), groups, -1, *seen.shape[2:]), axis=2)
    return jnp.mean(jnp.sum(by_group, axis=3, dtype=jnp.float32), axis=1)


def selector_reads(
    selector: SelectorModule,
    read: Bool[Array, "#b #h t s"],
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    fields: Mapping[str, Any],
    **options: Any,
) -> Reads:
    """Returns `selected_reads` of a selector's keys, `read`; what it scores to choose them counts."""
    number = number_read(read, k.shape[2], fields) + selector.number_scored(fields)
    return selected_reads(number, read, q, k, fields, **options)


def selected_reads(
    number: Float[Array, "b t"],
    read: Bool[Array, "#b #h t s"],
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    fields: Mapping[str, Any],
    *,
    bias: Float[Array, "#b #h t s"] | None = None,
    scale: float | None = None,
) -> Reads:
    """Returns what streamed tokens read: `number` keys each, and of the probability of attention to all keys, whose
    scores have `bias` and `scale`, the share of those in `read`."""

    def log_mass(bias: Float[Array, "#b #h t s"] | None) -> Float[Array, "b t h"]:
        return softmax_attention(q, k, k, bias=bias, scale=scale, return_lse=True, **fields)[1]

    hidden, segments = hidden_bias(read), fields["query_segments"]
    share = mass_kept(log_mass(hidden if bias is None else hidden + bias), log_mass(bias), segments)
    return Reads(jnp.sum(jnp.where(segments != 0, number, 0), axis=1), share)


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
