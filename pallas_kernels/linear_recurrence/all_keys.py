"""Linear attention to all keys of a document, whatever their order: one state per document, which its queries read.

S = sum_j k_j v_j^T,   o_i = S^T q_i        over the keys j of query i's document
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.linear_recurrence import linear_recurrence
from recollect.pallas_kernels.segments import zero_padding


def read_all_keys(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    key_segment_ids: Int[Array, "b s"] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "b t h v"]:
    """Returns what queries read of the keys of their own segment, in v's dtype; sums are fp32 at least.

    Documents need no order and may stand anywhere: tokens are sorted by segment, the keys of one before its queries,
    and read by one recurrence, in time and memory linear in their number.

    Args:
      segment_ids, key_segment_ids: of queries and of keys; 0 is padding, None is 1 for all.
      chunk_size: as in `linear_recurrence`.
    """
    if segment_ids is None and key_segment_ids is None:
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        state = jnp.einsum("bshk,bshv->bhkv", k, v, preferred_element_type=dtype)
        return jnp.einsum("bthk,bhkv->bthv", q, state, preferred_element_type=dtype).astype(v.dtype)
    of_queries, of_keys = (
        jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        for x, segments in ((q, segment_ids), (k, key_segment_ids))
    )
    segments = jnp.concatenate([of_keys, of_queries], axis=1)
    order = jnp.argsort(segments, axis=1, stable=True)
    keys = k.shape[1]
    before, after = (((0, 0), width, (0, 0), (0, 0)) for width in ((keys, 0), (0, q.shape[1])))
    rows = (
        jnp.pad(zero_padding(q, of_queries), before),
        jnp.pad(zero_padding(k, of_keys), after),
        jnp.pad(zero_padding(v, of_keys), after),
    )
    q, k, v = (jnp.take_along_axis(x, order[..., None, None], axis=1) for x in rows)
    o, _ = linear_recurrence(q, k, v, segment_ids=jnp.take_along_axis(segments, order, axis=1), chunk_size=chunk_size)
    return jnp.take_along_axis(o, jnp.argsort(order, axis=1)[:, keys:, None, None], axis=1)
