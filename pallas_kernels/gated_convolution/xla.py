"""The long convolution for XLA.

One document: a Toeplitz matrix per channel for short inputs, else a Fourier transform over at least 2t - 1 points, so
that nothing wraps around.

With segments: documents are contiguous, so of two neighbouring blocks only one document, the one that holds the
last token of the left block, can reach into the right one. Mask both blocks by it and the plain transform is exact;
blocks of 1, 2, 4, ... tokens (each pair once) then cover all pairs of tokens: O(b t d log^2 t) work, O(b t d) memory,
no matter how many documents there are.

Valid tokens are first moved to the front of their row and put back at the end. That alone makes padding
in the middle of a document harmless; masking would leave holes in the count of lags.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.chunking import compaction, permuted, taken
from recollect.pallas_kernels.gated_convolution import long
from recollect.pallas_kernels.segments import zero_padding

# Up to these lengths the matrix beats the transform: forward and backward on two CPU cores at b = 64, d = 64, the
# matrix takes 1.6 ms against 3.9 at t = 64, and 7.2 against 8.8 at t = 128; with b = 16 it loses from t = 128 on.
TOEPLITZ_UP_TO = 64
TOEPLITZ_BLOCKS_UP_TO = 32


def long_convolution(x: jax.Array, filter: jax.Array, *, segment_ids: jax.Array | None, dtype: Any = None) -> jax.Array:
    """See recollect.pallas_kernels.gated_convolution.long.gated; computes in fp32."""
    t = x.shape[1]
    filter = filter[:t].astype(jnp.float32)
    if segment_ids is None and TOEPLITZ_UP_TO < t <= blocks_up_to():
        return long.by_blocks(BLOCKS, jnp.float32, x, filter)
    if segment_ids is None:
        return _one_document(x.astype(jnp.float32), jnp.pad(filter, ((0, t - filter.shape[0]), (0, 0))))
    order, place = compaction(segment_ids)
    moved = permuted(zero_padding(x, segment_ids), order, place).astype(jnp.float32)
    y = documents_apart(moved, filter, taken(segment_ids, order))
    return zero_padding(permuted(y, place, order), segment_ids)


def blocks_up_to() -> int:
    """Returns the length up to which blocked Toeplitz products, rather than a Fourier transform, convolve one document
    here."""
    # A TPU has matrix units and no fast transform (not measured). On a CPU the transform wins: forward and gradient on
    # two busy cores (2026-11-23) take 18.6 ms against 48.4 at b = 16, t = 512, d = 64, and 29.5 against 128.0 at b = 4,
    # t = 2048, d = 64.
    return long.TOEPLITZ_UP_TO if dispatch.device().platform == "tpu" else 0


def _convolve_blocks(x: jax.Array, windows: jax.Array) -> jax.Array:
    n = x.shape[1]
    inputs = jnp.pad(x, ((0, 0), (n, 0), (0, 0), (0, 0)))

    def add(total: jax.Array, r: jax.Array) -> tuple[jax.Array, None]:
        shifted = jax.lax.dynamic_slice_in_dim(inputs, n - r, n, axis=1)
        return total + jnp.einsum("dnbj,dji->dnbi", shifted, long.toeplitz(windows[:, r]), precision="highest"), None

    return jax.lax.scan(add, jnp.zeros_like(x), jnp.arange(n))[0]


def _correlate_blocks(x: jax.Array, dy: jax.Array) -> jax.Array:
    n = x.shape[1]
    inputs = jnp.pad(x, ((0, 0), (n, 0), (0, 0), (0, 0)))

    def products(r: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice_in_dim(inputs, n - r, n, axis=1)
        return long.diagonal_sums(jnp.einsum("dnbj,dnbi->dji", shifted, dy, precision="highest"))

    return jnp.moveaxis(jax.lax.map(products, jnp.arange(n)), 0, 1)


BLOCKS = long.Products(128, 1, _convolve_blocks, _correlate_blocks)


def _one_document(x: jax.Array, filter: jax.Array) -> jax.Array:
    """x (b, t, d), filter (t, d)."""
    t, d = filter.shape
    if t <= TOEPLITZ_UP_TO:
        # Lags from t - 1 down to 1 - t, those below 0 empty.
        return toeplitz_product(x, jnp.concatenate([filter[::-1], jnp.zeros((t - 1, d))]))
    points = _transform_length(2 * t - 1)
    product = jnp.fft.rfft(x, points, axis=1) * jnp.fft.rfft(filter, points, axis=0)
    return jnp.fft.irfft(product, points, axis=1)[:, :t]


def toeplitz_product(x: jax.Array, taps: jax.Array) -> jax.Array:
    """Returns y_i = sum_j taps[n - 1 - i + j] x_j: x (..., n, d) and taps (2n - 1, d) give y (..., n, d)."""
    n = x.shape[-2]
    # Rows of a Toeplitz matrix are windows of one vector. Repeating the vector at a period one longer than a row skews
    # it by one a row, which gives all windows without a gather.
    period = jnp.pad(taps.T, ((0, 0), (0, 1)))
    d = period.shape[0]
    skewed = (
        jnp.broadcast_to(period[:, None], (d, n, 2 * n)).reshape(d, -1)[:, : n * (2 * n - 1)].reshape(d, n, 2 * n - 1)
    )
    # Row i is now the vector turned right by i; its window starts at column n - 1.
    return jnp.einsum("dij,...jd->...id", skewed[:, :, n - 1 :], x)


def documents_apart(x: jax.Array, filter: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the convolution within each document: x (b, t, d) with its padding at the end, filter (at most t, d)."""
    t = x.shape[1]
    y = filter[0] * x
    block = 1
    while block < t and filter.shape[0] > 1:  # lag 1 crosses the middle of blocks of any size
        y = y + _left_to_right(x, filter, segments, block)
        block *= 2
    return y


@functools.partial(
    jax.checkpoint, static_argnums=(3,)
)  # else the backward pass keeps a masked copy of x for each block size
def _left_to_right(x: jax.Array, filter: jax.Array, segments: jax.Array, block: int) -> jax.Array:
    """Returns what the first `block` tokens of every 2 * block contribute to the other half of them."""
    b, t, d = x.shape
    pairs = -(-t // (2 * block))
    end = 2 * block * pairs - t
    x = jnp.pad(x, ((0, 0), (0, end), (0, 0))).reshape(b, pairs, 2, block, d)
    segments = jnp.pad(segments, ((0, 0), (0, end))).reshape(b, pairs, 2, block)
    crossing = segments[:, :, :1, -1:]
    within = (segments == crossing)[..., None]
    left = jnp.where(within[:, :, 0], x[:, :, 0], 0)
    taps = filter[: 2 * block]
    taps = jnp.pad(taps, ((0, 2 * block - taps.shape[0]), (0, 0)))
    if block <= TOEPLITZ_BLOCKS_UP_TO:
        y = toeplitz_product(left, taps[:0:-1])
    else:
        # Lags run from 1 to 2 * block - 1: over 2 * block points the half that is read holds nothing that wrapped
        # around.
        product = jnp.fft.rfft(left, 2 * block, axis=2) * jnp.fft.rfft(taps, axis=0)
        y = jnp.fft.irfft(product, 2 * block, axis=2)[:, :, block:]
    y = jnp.where(within[:, :, 1], y, 0)
    return jnp.stack([jnp.zeros_like(y), y], axis=2).reshape(b, -1, d)[:, :t]


def _transform_length(least: int) -> int:
    """Returns the smallest 2^a, 3 * 2^a or 5 * 2^a that is at least `least`: lengths with large prime factors are
    slow."""
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5))
