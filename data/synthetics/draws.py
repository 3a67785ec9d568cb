"""Draws that several tasks make."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def distinct(key: Key[Array, ""], batch_size: int, choices: int, count: int) -> Int[Array, "b n"]:
    """Returns `count` different numbers of 0 .. choices - 1 per row, every ordered selection equally likely."""
    if choices < 4 * count:  # redrawing would take long; a random number per choice is cheap then
        return jax.lax.top_k(jax.random.uniform(key, (batch_size, choices)), count)[1].astype(jnp.int32)
    # All are drawn, and those that repeat an earlier one of their row again until none does: a few rounds. Nothing here
    # distinguishes one number from another, so all ordered selections are equally likely.
    earlier = jnp.tri(count, k=-1, dtype=bool)

    def redraw(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        drawn, repeated, round = carry
        new = jax.random.randint(jax.random.fold_in(key, round), (batch_size, count), 0, choices, jnp.int32)
        drawn = jnp.where(repeated, new, drawn)
        return drawn, jnp.any((drawn[:, :, None] == drawn[:, None, :]) & earlier, axis=-1), round + 1

    none = jnp.zeros((batch_size, count), jnp.int32)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), redraw, (none, none == 0, jnp.uint32(0)))[0]


def remaining(rank: Int[Array, "b t"], taken: Int[Array, "b n"]) -> Int[Array, "b t"]:
    """Returns the number at `rank` among 0, 1, 2, ... without `taken`, which is sorted and without repeats."""
    # taken[i] - i numbers before taken[i] are free: it comes before the free number of this rank iff that is <= rank.
    free_before = taken - jnp.arange(taken.shape[1], dtype=taken.dtype)
    return rank + jnp.sum(free_before[:, None, :] <= rank[:, :, None], axis=-1, dtype=rank.dtype)
