"""Tokens split over devices: every device keeps its queries, and fetches the keys and values they see.

With a window of w keys these are the part itself and the w - 1 before them. While these are no more than a part holds,
a part with them in front is a sequence of its own, and any backend of self-attention serves it; the queries in front
are dropped. Of a longer window, and without one or with a mask, queries attend to keys with their positions in the
whole sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import sequence_collectives
from recollect.pallas_kernels.dispatch import sequence_parts
from recollect.pallas_kernels.sharding import over_sequence

UNSEEN = 2**29
"""The position of keys before the sequence: after all queries."""


def over_devices(
    run: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    mask: Any,
    sinks: jax.Array | None,
    bias: jax.Array | None,
    dropout: jax.Array | None,
    positions: jax.Array | None,
    segments: jax.Array | None,
    fields: Any,
    return_lse: bool,
) -> Any:
    """Returns self-attention by the public function `run`, its settings bound, tokens split over the ambient mesh's
    axis sequence; returns as it does.

    Of documents with padding inside of them, a window sees no further than w - 1 places back, padding counted.
    """
    t = q.shape[1] // sequence_parts(q.shape[1])
    expression = None if isinstance(mask, jax.Array) else mask
    dense = mask if isinstance(mask, jax.Array) else None

    def part(q, k, v, sinks, bias, dropout, dense, positions, segments, fields):
        near = window if bias is None and dropout is None else None  # these have a column for every key
        if near is not None and near - 1 <= t:
            return _within_window(run, q, k, v, near, sinks, positions, segments)
        query_positions = sequence_collectives.global_positions(*q.shape[:2]) if positions is None else positions
        seen: Callable[[jax.Array], jax.Array]
        if near is not None and near - 1 < (sequence_collectives.parts() - 1) * t:
            seen = functools.partial(_with_before, size=near - 1)
            exists = sequence_collectives.first_position(t) - (near - 1) + jnp.arange(near - 1 + t) >= 0
            key_positions = jnp.where(exists, seen(query_positions), UNSEEN)
        else:
            seen, key_positions = sequence_collectives.gathered, sequence_collectives.gathered(query_positions)
        return run(
            q,
            seen(k),
            seen(v),
            window=window,
            mask=expression if dense is None else dense,
            sinks=sinks,
            bias=bias,
            dropout=dropout,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=segments,
            key_segments=None if segments is None else seen(segments),
            query_fields=fields,
            key_fields=None if fields is None else {name: seen(x) for name, x in fields.items()},
        )

    letters = {"q": "b t h k", "k": "b t h k", "v": "b t h v", "sinks": "h", "bias": "b h t s"}
    letters |= {"dropout": "b h t s", "dense": "b t s"}
    results = ("b t h v", "b t h") if return_lse else "b t h v"
    return over_sequence(part, {**letters, "positions": "b t", "segments": "b t", "fields": "b t"}, results)(
        q, k, v, sinks, bias, dropout, dense, positions, segments, fields
    )


def _within_window(run, q, k, v, window, sinks, positions, segments):
    """Runs a part and the window - 1 tokens before it as a sequence of its own."""
    (b, t), front = q.shape[:2], window - 1

    seen = functools.partial(_with_before, size=front)
    exists = sequence_collectives.first_position(t) - front + jnp.arange(front + t) >= 0
    segments = jnp.broadcast_to(exists.astype(jnp.int32), (b, front + t)) if segments is None else seen(segments)
    positions = None if positions is None else seen(positions)
    queries = jnp.pad(q, ((0, 0), (front, 0), (0, 0), (0, 0)))
    outputs = run(
        queries, seen(k), seen(v), window=window, sinks=sinks, query_positions=positions, query_segments=segments
    )
    return jax.tree.map(lambda x: x[:, front:], outputs)


def _with_before(x: jax.Array, size: int) -> jax.Array:
    """Returns a part (b, t, ...) with the `size` tokens before it: (b, size + t, ...)."""
    return jnp.concatenate([sequence_collectives.previous_tokens(x, size), x], axis=1)
