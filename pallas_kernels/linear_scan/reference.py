"""The specification: one token after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_scan(a: jax.Array, b: jax.Array, state: jax.Array, *, chunk_size: int | None = None) -> jax.Array:
    """Returns h (b, t, f) of one document from `state` (b, f) on; one token is a step without a loop. `chunk_size` is
    not used."""
    if a.shape[1] == 1:
        return (a[:, 0] * state + b[:, 0])[:, None]

    def step(h: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = token[0] * h + token[1]
        return h, h

    return jnp.moveaxis(jax.lax.scan(step, state, (jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)))[1], 0, 1)
