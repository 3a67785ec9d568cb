"""Landmark tokens inside the model: one after every `block` ordinary tokens of a document, removed before the head.

Data, labels and loss never see them. Blocks restart with each document, so a landmark's place follows from the document
positions alone, and a stream inserts it in the same call as the token that fills its block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recollect.layers.mixer import Context
from recollect.layers.modules.linear import embedding_init, parameter
from recollect.pallas_kernels.masks import LANDMARK, ORDINARY


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where t ordinary tokens stand among the t' tokens that the layers see.

    Attributes:
      slots: index in the longer sequence of the output that predicts what comes after each ordinary token: its own,
        or where landmarks are predicted (landmark_prediction.py) that of the landmark which follows it.
      source: the ordinary token at each index of the longer sequence; meaningless at landmarks.
      context: fields of the longer sequence.
    """

    slots: Int[Array, "b t"]
    source: Int[Array, "b longer"]
    context: Context


def vector(width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns the parameter that stands at landmarks."""
    return parameter(embedding_init()(rngs.params(), (width,), jnp.float32), "d", decay=True)


def ordinary_length(limit: int, block: int) -> int:
    """Returns how many ordinary tokens fit into `limit` tokens that the layers see."""
    # n ordinary tokens stand among n + n // block; the largest n for which that fits.
    return limit - (limit + 1) // (block + 1)


def expanded_length(length: int, block: int) -> int:
    """Returns how many tokens the layers see for `length` ordinary tokens from the start of a stream."""
    return length + length // block


def inserted(
    model: Any, x: Float[Array, "b t d"], context: Context, *, from_start: bool
) -> tuple[Float[Array, "b longer d"], Context, Layout | None]:
    """Returns vectors and context with the landmarks of a `LanguageModelModule`, and where these stand; as they are,
    and None, of a model without any."""
    block = model.config.landmark_block
    if model.landmark is None or block is None:
        return x, context, None
    how = {"from_start": from_start, "predicted": model.config.predicts_landmarks}
    layout = layout_of(context, x.shape[0], x.shape[1], block, **how)
    return insert(x, model.landmark[...], layout), layout.context, layout


def layout_of(
    context: Context, batch_size: int, length: int, block: int, *, from_start: bool, predicted: bool
) -> Layout:
    """Returns the layout of rows whose context has segments with positions, or is one document from its start.

    Args:
      from_start: documents start in this call (fewer landmarks can occur), else a stream may continue mid-block.
      predicted: whether landmarks are predicted.
    """
    if context.segments is None:
        longer = plain_layout(batch_size, length, block)
    else:
        assert context.positions is not None
        longer = layout(context.positions, context.segments, block, from_start=from_start)
    ids = context.token_ids
    if ids is not None:
        is_landmark = longer.context.token_types == LANDMARK
        ids = jnp.where(is_landmark, -1, jnp.take_along_axis(ids, longer.source, axis=1))
    slots = longer.slots
    if predicted and longer.source.shape[1] > length:
        after = jnp.minimum(slots + 1, longer.source.shape[1] - 1)
        assert longer.context.token_types is not None
        slots = jnp.where(jnp.take_along_axis(longer.context.token_types, after, axis=1) == LANDMARK, after, slots)
    types, fields = longer.context.token_types, context.fields
    if context.token_types is not None:
        ordinary = jnp.take_along_axis(context.token_types, longer.source, axis=1)
        types = jnp.where(types == LANDMARK, LANDMARK, ordinary)
    if fields is not None:
        fields = {name: jnp.take_along_axis(field, longer.source, axis=1) for name, field in fields.items()}
    context = dataclasses.replace(
        context,
        positions=longer.context.positions,
        segments=longer.context.segments,
        token_types=types,
        token_ids=ids,
        fields=fields,
        vectors=None,
    )
    return dataclasses.replace(longer, slots=slots, context=context)


def plain_layout(batch_size: int, length: int, block: int) -> Layout:
    """Returns the layout of one document from its start, known when the program is traced; segments stay None."""
    index = jnp.arange(expanded_length(length, block), dtype=jnp.int32)
    rows = (batch_size, index.shape[0])
    ordinary = jnp.arange(length, dtype=jnp.int32)
    types = jnp.where(index % (block + 1) == block, LANDMARK, ORDINARY).astype(jnp.int32)
    return Layout(
        slots=jnp.broadcast_to(ordinary + ordinary // block, (batch_size, length)),
        source=jnp.broadcast_to(jnp.minimum(index - index // (block + 1), length - 1), rows),
        context=Context(positions=None, segments=None, token_types=jnp.broadcast_to(types, rows)),
    )


def layout(positions: Int[Array, "b t"], segments: Int[Array, "b t"], block: int, *, from_start: bool) -> Layout:
    """Returns the layout of any rows of documents, with `positions` in ordinary tokens. Free slots are padding at the
    end."""
    b, t = positions.shape
    most = t // block if from_start else -(-t // block)
    closes = (segments != 0) & ((positions + 1) % block == 0)
    index = jnp.arange(t, dtype=jnp.int32)
    slots = index + (jnp.cumsum(closes, axis=1) - closes).astype(jnp.int32)
    landmark_slots = jnp.where(closes, slots + 1, t + most)
    rows = jnp.arange(b)[:, None]
    longer = positions + positions // block

    def place(ordinary: jax.Array, landmark: jax.Array, fill: int) -> jax.Array:
        empty = jnp.full((b, t + most), fill, jnp.int32)
        return empty.at[rows, slots].set(ordinary, mode="drop").at[rows, landmark_slots].set(landmark, mode="drop")

    context = Context(
        positions=place(longer, longer + 1, 0),
        segments=place(segments, segments, 0),
        token_types=place(jnp.full_like(segments, ORDINARY), jnp.full_like(segments, LANDMARK), ORDINARY),
    )
    return Layout(slots, place(index, index, 0), context)


def insert(x: Float[Array, "b t d"], landmark: Float[Array, " d"], layout: Layout) -> Float[Array, "b longer d"]:
    """Returns the longer sequence, with the vector `landmark` at landmarks."""
    longer = jnp.take_along_axis(x, layout.source[..., None], axis=1)
    assert layout.context.token_types is not None
    return jnp.where((layout.context.token_types == LANDMARK)[..., None], landmark.astype(x.dtype), longer)


def remove(x: Float[Array, "b longer d"], layout: Layout) -> Float[Array, "b t d"]:
    """Returns the outputs of the longer sequence that predict what comes after each ordinary token."""
    return jnp.take_along_axis(x, layout.slots[..., None], axis=1)
