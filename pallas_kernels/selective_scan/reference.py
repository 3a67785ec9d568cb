"""The specification: one token after another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def selective_scan(
    rows: Mapping[str, jax.Array], log_decay: jax.Array, state: jax.Array, *, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns y (b, t, f) and the last state (b, f, n); one token is a step without a loop. `chunk_size` is not used.

    rows: u, step (b, t, f), write and read (b, t, n); with several documents `kept` (b, t), 0 where one starts.
    """

    def step(h: jax.Array, token: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if "kept" in token:
            h = token["kept"][:, None, None] * h
        added = (token["step"] * token["u"])[..., None] * token["write"][:, None]
        h = jnp.exp(token["step"][..., None] * log_decay) * h + added
        return h, jnp.einsum("bfn,bn->bf", h, token["read"])

    if rows["u"].shape[1] == 1:
        state, y = step(state, {name: x[:, 0] for name, x in rows.items()})
        return y[:, None], state
    state, y = jax.lax.scan(step, state, {name: jnp.moveaxis(x, 1, 0) for name, x in rows.items()})
    return jnp.moveaxis(y, 0, 1), state
