"""Positions in rows that hold several documents, one after another, with padding anywhere between them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from recollect.pallas_kernels import segments as packed_rows

if TYPE_CHECKING:
    from recollect.layers.mixer import Context, Cursor


def document_positions(segments: Int[Array, "b t"], cursor: Cursor | None = None) -> Int[Array, "b t"]:
    """Returns the index of each token within its document; padding gets the index of the next token of its row.

    Counts valid tokens, so that padding between or before documents shifts nothing. With a cursor, tokens of the
    cursor's segment continue at its position.
    """
    valid = segments != 0
    count = jnp.cumsum(valid, axis=1) - valid  # valid tokens before each one
    starts = valid & (segments != previous_segment(segments, cursor))
    start_count = jax.lax.cummax(jnp.where(starts, count, -1), axis=1)
    offset = 0 if cursor is None else cursor.position[:, None]
    return jnp.where(start_count >= 0, count - start_count, count + offset).astype(jnp.int32)


def continued(context: Context, cursor: Cursor, batch_size: int, length: int) -> tuple[Context, Cursor]:
    """Returns the context with every field filled in, continuing the cursor's stream, and the cursor after the
    tokens: see `Cursor.read`."""
    segments = context.segments
    if segments is None:
        current = jnp.where(cursor.segment == 0, 1, cursor.segment)
        segments = jnp.broadcast_to(current[:, None], (batch_size, length))
        counted = cursor.position[:, None] + jnp.arange(length, dtype=jnp.int32)
        last_segment = current
    else:
        counted = document_positions(segments, cursor)
        last_segment = last_valid(segments, segments, cursor.segment)
    positions = counted if context.positions is None else context.positions
    types = jnp.zeros_like(segments) if context.token_types is None else context.token_types
    position = last_valid(positions + 1, segments, cursor.position)
    tokens = dataclasses.replace(context, positions=positions, segments=segments, token_types=types)
    return tokens, dataclasses.replace(cursor, position=position, segment=last_segment)


def token_positions(context: Context, batch_size: int, length: int) -> Int[Array, "b t"]:
    """Returns the context's positions, counted within documents where it has none."""
    if context.positions is not None:
        return context.positions
    if context.segments is not None:
        return document_positions(context.segments)
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))


def previous_segment(segments: Int[Array, "b t"], cursor: Cursor | None = None) -> Int[Array, "b t"]:
    """Returns the segment of the valid token before each token; before the first it is the cursor's, else 0."""
    return packed_rows.segments_before(segments, None if cursor is None else cursor.segment)


def last_valid(
    values: Shaped[Array, "b t *rest"], segments: Int[Array, "b t"], otherwise: Shaped[Array, " b *rest"]
) -> Shaped[Array, " b *rest"]:
    """Returns the value at the last valid token of each row, `otherwise` for rows of padding only."""
    valid = segments != 0
    index = jnp.max(jnp.where(valid, jnp.arange(segments.shape[1]), -1), axis=1)
    extra = (1,) * (values.ndim - 2)
    taken = jnp.take_along_axis(values, jnp.maximum(index, 0).reshape(-1, 1, *extra), axis=1)[:, 0]
    return jnp.where((index >= 0).reshape(-1, *extra), taken, otherwise)
