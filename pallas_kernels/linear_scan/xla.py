"""The scan in chunks: an associative scan inside chunks of c tokens, one state between them.

Maps h -> a h + b compose to (a' a, a' b + b'), which needs log2(c) steps over a chunk. The gradient is the same scan in
reverse,

    dh_t = g_t + a_{t+1} dh_{t+1},    da_t = dh_t h_{t-1},    db_t = dh_t,

so that nothing but a and h is kept for it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 64


def linear_scan(a: jax.Array, b: jax.Array, state: jax.Array, *, chunk_size: int | None = None) -> jax.Array:
    """Returns h (b, t, f) of one document from `state` (b, f) on."""
    return _scan(min(CHUNK if chunk_size is None else chunk_size, a.shape[1]), a, b, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(size: int, a: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
    return _chunks(size, a, b, state)


def _forward(size, a, b, state):
    h = _chunks(size, a, b, state)
    return h, (a, h, state)


def _backward(size, kept, gradient):
    a, h, state = kept
    following = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
    dh = _chunks(size, following[:, ::-1], gradient[:, ::-1], jnp.zeros_like(state))[:, ::-1]
    before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    return dh * before, dh, dh[:, 0] * a[:, 0]


_scan.defvjp(_forward, _backward)


def _chunks(size: int, a: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
    rows, t, f = a.shape
    n = -(-t // size)
    if missing := n * size - t:
        a, b = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (a, b))

    def one(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        factors, sums = jax.lax.associative_scan(_compose, chunk, axis=1)
        h = factors * state[:, None] + sums
        return h[:, -1], h

    if n == 1:
        return one(state, (a, b))[1][:, :t]
    a, b = (jnp.moveaxis(x.reshape(rows, n, size, f), 1, 0) for x in (a, b))
    h = jax.lax.scan(one, state, (a, b))[1]
    return jnp.moveaxis(h, 0, 1).reshape(rows, n * size, f)[:, :t]


def _compose(early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return late[0] * early[0], late[0] * early[1] + late[1]
