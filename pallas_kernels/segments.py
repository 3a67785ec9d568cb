"""Documents packed into rows: segment ids (b, t), of which 0 is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

if TYPE_CHECKING:
    KnownArray = jax.Array
else:
    KnownArray = jax.Array | np.ndarray
    """Fields of tokens may be numpy's: what follows from them is then known when a program is traced."""


def carry_segments(segment_ids: Int[Array, "b t"], first: Int[Array, " b"]) -> Int[Array, "b t"]:
    """Returns segments in which padding takes the segment of the token before it; `first` stands before each row."""
    index = jax.lax.cummax(jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    return jnp.where(index >= 0, jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1), first[:, None])


def segments_before(segment_ids: Int[Array, "b t"], first: Int[Array, " b"] | None = None) -> Int[Array, "b t"]:
    """Returns the segment of the token before each token, padding left out; before the first it is `first`, or 0."""
    first = jnp.zeros_like(segment_ids[:, 0]) if first is None else first
    return jnp.concatenate([first[:, None], carry_segments(segment_ids, first)[:, :-1]], axis=1)


def document_starts(segment_ids: Int[Array, "b t"], first: Int[Array, " b"] | None = None) -> Bool[Array, "b t"]:
    """Returns which tokens are the first of a document; one of segment `first` stands before each row, or none."""
    return (segment_ids != 0) & (segment_ids != segments_before(segment_ids, first))


def document_numbers(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns 0 for tokens of the first document that a row has, 1 for the next, and so on; padding gets the number of
    the document before it."""
    return jnp.maximum(jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32) - 1, 0)


def zero_padding(x: Shaped[Array, "b t ..."], segment_ids: Int[KnownArray, "b t"] | None) -> Shaped[Array, "b t ..."]:
    """Returns x with zeros at padding. By `where`, so that NaN in padding stops here, in gradients too."""
    if segment_ids is None:
        return x
    return jnp.where((segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)), x, 0)
