"""How segments whose order means nothing are ranked and laid out (PINE: layers/mixers/position_invariant_attention.py).

Easy to get wrong: segments of equal importance must get equal positions, since any choice between them would follow
their order; so a segment moves by the lengths of the segments that matter more, which needs no sort.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recollect.pallas_kernels.softmax_attention.xla import unnormalised_softmax


def importance(
    q: Float[Array, "b t h k"], k: Float[Array, "b s h k"], members: Bool[Array, "b t n"], same: Bool[Array, "b t s"]
) -> Float[Array, "b h t n"]:
    """Returns each segment's importance to each token's reader, infinite for the reader's own segment. `same` pairs are
    of one document."""
    n = members.astype(jnp.float32)
    own = jnp.einsum("btn,bsn->bts", n, n) > 0
    seen = same & jnp.any(members, axis=2)[:, None, :] & ~own
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights, total, _ = unnormalised_softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    mass = (
        jnp.einsum("bhts,bsn->bhtn", weights / total[..., None], n) / jnp.maximum(jnp.sum(n, axis=1), 1)[:, None, None]
    )
    of_segment = jnp.einsum("bhtn,btm,bum->bhun", mass, n, n)
    within = jnp.any(members, axis=2)[:, None, :, None]
    return jax.lax.stop_gradient(jnp.where(members[:, None], jnp.inf, jnp.where(within, of_segment, mass)))


def moves(importance: Float[Array, "b h t n"], members: Bool[Array, "b t n"]) -> Int[Array, "b h t n"]:
    """Returns by how much each segment is moved back: the tokens of the segments that matter more."""
    lengths = jnp.sum(members, axis=1, dtype=jnp.int32)
    more = importance[..., None, :] > importance[..., :, None]
    return jnp.einsum("bhtnm,bm->bhtn", more.astype(jnp.int32), lengths)


def stacked(positions: Int[Array, "b t"], members: Bool[Array, "b t n"]) -> Int[Array, "b t"]:
    """Returns the positions at which all segments end where the last one does."""
    ends = jnp.max(jnp.where(members, positions[:, :, None], -1), axis=1)  # (b, n)
    own_end = jnp.sum(jnp.where(members, ends[:, None], 0), axis=2)
    return jnp.where(jnp.any(members, axis=2), positions + jnp.max(ends, axis=1, keepdims=True) - own_end, positions)
