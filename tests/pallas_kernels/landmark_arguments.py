"""Arguments and comparisons that landmark attention's tests share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.landmark_attention import (
    reference,
)
from tests.pallas_kernels import landmark_oracle

CLOSE = 5e-6  # fp32, products of softmaxes over up to 30 terms


def rotate(x, positions):
    """The oracle's rotation: first half of the dimensions paired with the second."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None].astype(jnp.float32) * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], axis=-1
    )


def document_positions(segments) -> jax.Array:
    """Positions within documents; padding stands at 0."""
    segments = np.asarray(segments)
    count = [[int(np.sum(row[:i] == row[i])) if row[i] else 0 for i in range(len(row))] for row in segments]
    return jnp.asarray(np.array(count, np.int32))


def error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((found - expected) ** 2)) / size) if size else float(np.max(np.abs(found), initial=0))


def arrays(b, t, h, g, s=None, k=8, v=6):
    rng = np.random.default_rng(t)
    s = t if s is None else s
    shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v))
    return tuple(jnp.asarray(1.5 * rng.normal(size=shape), jnp.float32) for shape in shapes)


def rows(*documents: list[int]) -> jax.Array:
    """Segments from lists of (length, minus length for padding); documents number 3, 4, ..."""
    found = [
        np.concatenate([np.full(abs(n), 0 if n < 0 else 3 + index, np.int32) for index, n in enumerate(row)])
        for row in documents
    ]
    return jnp.asarray(np.stack(found))


PACKED = rows([8, 1, 6, -2, 9, -1], [-3, 17, 5, 2], [27])
"""27 tokens per row: documents that start anywhere, one shorter than a block, padding before, between and after."""


def fields(segments, queries=None):
    positions = document_positions(segments)
    pick = slice(None) if queries is None else slice(-queries, None)
    return {
        "query_positions": positions if queries is None else positions[:, pick],
        "key_positions": positions,
        "query_segments": segments if queries is None else segments[:, pick],
        "key_segments": segments,
    }


def packed_fields(segments):
    """Of self-attention, where keys' fields may be left out."""
    return {"query_positions": document_positions(segments), "query_segments": segments}


def plain(b, t):
    return fields(jnp.ones((b, t), jnp.int32))


def oracle_weights(q, k, block, f):
    f = {name: np.asarray(x) for name, x in f.items()}
    return landmark_oracle.training_weights(
        q,
        k,
        block,
        q.shape[-1] ** -0.5,
        f["query_positions"],
        f["key_positions"],
        f["query_segments"],
        f["key_segments"],
    )


def weights_of(q, k, f):
    return np.asarray(jax.jit(functools.partial(reference.weights, block=4, scale=8**-0.5))(q, k, **f)[0])
