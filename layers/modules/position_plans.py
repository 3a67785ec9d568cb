"""Positions of tokens that stand in grids, or in segments whose order means nothing, from the tokens' fields.

Text counts on by one; plans differ in how far a grid moves the count on, and in where its cells are. They count within
documents, and without cells they are the tokens' ordinary positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from recollect.layers.context import Context
from recollect.pallas_kernels.segments import document_numbers, document_starts

Fields = Mapping[str, Int[Array, "b t"]]
"""By name: segments, and of cells grid (from 1, 0 elsewhere), ring, row and column."""


def fields_of(context: Context, batch_size: int, length: int) -> dict[str, Int[Array, "b t"]]:
    """Returns those fields of a call's tokens, zeros for what it does not give, one document where it has none."""
    zeros = jnp.zeros((batch_size, length), jnp.int32)
    segments = zeros + 1 if context.segments is None else context.segments
    return {**dict.fromkeys(("grid", "ring", "row", "column"), zeros), **(context.fields or {}), "segments": segments}


def concentric(fields: Fields) -> Int[Array, "b t"]:
    """Returns positions by rings: the first of a grid's for the cells on its border, the next for the ring within.

    A grid of R x R cells takes ceil(R / 2) positions, so that text behind it is near all of them. Xing et al., CCA
    (arXiv 2410.15926), section 4.
    """
    is_cell, ring, row, column = fields["grid"] > 0, fields["ring"], fields["row"], fields["column"]
    # The first cell of each ring is on the diagonal, and moves the count on.
    count = _before(~is_cell | ((row == ring) & (column == ring)), fields["segments"])
    first = jax.lax.cummax(jnp.where(is_cell & (row == 0) & (column == 0), count, 0), axis=1)
    return jnp.where(is_cell, first + ring, count) - _at_start(count, fields["segments"])


def parallel(fields: Fields) -> Int[Array, "b t"]:
    """Returns positions that count from the same one in each of a document's grids, which follow one another; text
    behind them begins after the longest.

    Ratner et al., Parallel Context Windows (arXiv 2212.10947), section 3.
    """
    segments, grid = fields["segments"], fields["grid"]
    is_cell = (grid > 0) & (segments != 0)
    cells, text = _before(is_cell, segments), _before(~is_cell, segments)
    before = jnp.pad(grid, ((0, 0), (1, 0)))[:, :-1]
    opens = is_cell & ((grid != before) | document_starts(segments))
    within = cells - jax.lax.cummax(jnp.where(opens, cells, 0), axis=1)
    # The longest grid so far of the document: numbers of documents keep those of earlier ones below.
    scale = 1 + segments.shape[1]
    number = scale * document_numbers(segments)
    longest = jax.lax.cummax(number + jnp.where(is_cell, within + 1, 0), axis=1) - number
    return text - _at_start(text, segments) + jnp.where(is_cell, within, longest)


def _before(counted: Bool[Array, "b t"], segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns how many counted tokens, padding left out, stand before each in its row."""
    counted = counted & (segments != 0)
    return jnp.cumsum(counted, axis=1, dtype=jnp.int32) - counted


def _at_start(count: Int[Array, "b t"], segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the count at the start of each token's document."""
    return jax.lax.cummax(jnp.where(document_starts(segments), count, 0), axis=1)
