"""Documents packed into rows: segment ids (b, t), of which 0 is padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def carry_segments(segment_ids: Int[Array, "b t"], first: Int[Array, " b"]) -> Int[Array, "b t"]:
    """Returns segments in which padding takes the segment of the token before it; `first` stands before each row."""
    index = jax.lax.cummax(jnp.where(segment_ids != 0, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    return jnp.where(index >= 0, jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1), first[:, None])


def zero_padding(x: Shaped[Array, "b t ..."], segment_ids: Int[Array, "b t"] | None) -> Shaped[Array, "b t ..."]:
    """Returns x with zeros at padding. By `where`, so that NaN in padding stops here, in gradients too."""
    if segment_ids is None:
        return x
    return jnp.where((segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2)), x, 0)
