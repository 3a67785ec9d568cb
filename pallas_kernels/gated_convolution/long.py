"""What the backends of the long convolution share: its gates, and the convolution as products of blocked Toeplitz
matrices.

Time in blocks of c tokens, n of them. Block J of the output is a sum over r of block J - r of the input times a (c, c)
matrix T_r whose entry (j, i) is filter[c r + i - j]: Toeplitz, one per lag of blocks and channel. Work O(b t^2 d / 2),
all of it matrix products; bit for bit causal. With channels first and blocks before rows of the batch, (d, n, b, c),
all rows of blocks meet one T_r in one product.

    gradient of x:       the same sum run backwards in time: reverse dy, convolve, reverse
    gradient of filter:  C_r = sum over J and rows of x_{J-r}^T dy_J, whose diagonals are the lags: entry (j, i) is lag
      c r + i - j

Bytes besides what the kernels read and write: a transposition of x in and of y out (of dy in, dx out and x again
backward), which gates, casts and padding fuse into; and 2 c values a block and channel for the filter, from which
matrices are built on the chip.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TOEPLITZ_UP_TO = 4096  # work grows with t^2: beyond it Fourier transforms do less


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products of one backend.

    Attributes:
      block: c, tokens per block.
      rows: the batch is padded to a multiple of it.
      convolve: (x (d, n, b, c), windows (d, n, 2 c) fp32) -> y (d, n, b, c) fp32; see `filter_windows`.
      correlate: (x reversed within blocks, dy; (d, n, b, c) each) -> (d, n, 2 c) fp32, entry m of block r the gradient
        of lag c r + m - (c - 1), the last entry anything.
    """

    block: int
    rows: int
    convolve: Callable[[jax.Array, jax.Array], jax.Array]
    correlate: Callable[[jax.Array, jax.Array], jax.Array]


def gated(run: Callable[..., jax.Array], x, filter, in_gate, out_gate, skip, segment_ids) -> jax.Array:
    """Returns the gated long convolution by `run(u, filter, segment_ids=, dtype=)`, which convolves without gates and
    returns fp32.

    dtype: x's, what `run` may round factors to.
    """
    gates = [x, in_gate, out_gate]
    if segment_ids is not None and (in_gate is not None or out_gate is not None or skip is not None):
        valid = (segment_ids != 0)[:, :, None]
        gates = [None if part is None else jnp.where(valid, part, 0) for part in gates]
    inputs, in_gate, out_gate = gates
    if in_gate is not None:
        inputs = inputs.astype(jnp.float32) * in_gate.astype(jnp.float32)
    y = run(inputs, filter, segment_ids=segment_ids, dtype=x.dtype)
    if skip is not None:
        y = y + skip.astype(jnp.float32) * inputs.astype(jnp.float32)
    if out_gate is not None:
        y = y * out_gate.astype(jnp.float32)
    return y.astype(x.dtype)


def refuses(x, filter, *, segment_ids=None, **settings: Any) -> str | None:
    """Returns why no kernel of blocked products serves a call; None if one may."""
    if segment_ids is not None:
        return "it convolves whole rows; segments need documents convolved apart"
    if x.shape[1] > TOEPLITZ_UP_TO:
        return (
            f"blocked products serve up to {TOEPLITZ_UP_TO} tokens, beyond which Fourier transforms do less; "
            f"this is {x.shape[1]}"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_blocks(products: Products, dtype: Any, x: jax.Array, filter: jax.Array) -> jax.Array:
    """Returns filter * x: x (b, t, d), filter (any length, d) give (b, t, d) fp32; factors rounded to dtype, sums in
    fp32."""
    b, t, _ = x.shape
    windows = filter_windows(filter, products.block, -(-t // products.block))
    return _from_blocks(products.convolve(_to_blocks(products, dtype, x), windows), b, t)


def _forward(products: Products, dtype: Any, x: jax.Array, filter: jax.Array):
    return by_blocks(products, dtype, x, filter), (x, filter)


def _backward(products: Products, dtype: Any, saved, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, filter = saved
    dx = jnp.flip(by_blocks(products, dtype, jnp.flip(dy, axis=1), filter), axis=1)
    sums = products.correlate(_to_blocks(products, dtype, x, reverse=True), _to_blocks(products, dtype, dy))
    # Lags below 0 of block r are lags of block r - 1; those of the first are none.
    upper, lower = sums[:, :, products.block - 1 : -1], sums[:, 1:, : products.block - 1]
    taps = upper + jnp.pad(lower, ((0, 0), (0, 1), (1, 0)))
    taps = taps.reshape(taps.shape[0], -1).T[: min(x.shape[1], filter.shape[0])]
    return dx.astype(x.dtype), jnp.pad(taps, ((0, filter.shape[0] - taps.shape[0]), (0, 0))).astype(filter.dtype)


by_blocks.defvjp(_forward, _backward)


def filter_windows(filter: jax.Array, block: int, count: int) -> jax.Array:
    """Returns the lags that T_r is made of, (d, count, 2 c) fp32: first lags c r to c r + c - 1, then c (r - 1) to c r
    - 1; those below 0 are 0.

    Rotated to the right by j, a window's first c entries are row j of T_r.
    """
    length, d = filter.shape
    taps = filter[: count * block].astype(jnp.float32).T
    taps = jnp.pad(taps, ((0, 0), (block, max(0, count * block - length)))).reshape(d, count + 1, block)
    return jnp.concatenate([taps[:, 1:], taps[:, :-1]], axis=2)


def toeplitz(windows: jax.Array) -> jax.Array:
    """Returns T_r (..., c, c) of windows (..., 2 c), without a gather."""
    size = windows.shape[-1]
    # Repeated at a period one longer than a row, a vector is rotated by one more each row.
    repeated = jnp.broadcast_to(windows[..., None, :], (*windows.shape[:-1], size // 2, size)).reshape(
        *windows.shape[:-1], -1
    )
    rows = repeated[..., : size // 2 * (size - 1)].reshape(*windows.shape[:-1], size // 2, size - 1)
    return rows[..., : size // 2]


def diagonal_sums(products: jax.Array) -> jax.Array:
    """Returns sums of (..., c, c) along diagonals, (..., 2 c): entry m is the sum over j of [j, m - j] (what
    `correlate` gives)."""
    size = products.shape[-1]
    # Rows one shorter than they are move each row by one more to the right: diagonals become columns.
    wide = jnp.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, size)]).reshape(*products.shape[:-2], -1)
    columns = wide[..., : size * (2 * size - 1)].reshape(*products.shape[:-1], 2 * size - 1)
    return jnp.pad(jnp.sum(columns, axis=-2), [(0, 0)] * (products.ndim - 2) + [(0, 1)])


def _to_blocks(products: Products, dtype: Any, x: jax.Array, *, reverse: bool = False) -> jax.Array:
    b, t, d = x.shape
    x = jnp.pad(x.astype(dtype), ((0, -b % products.rows), (0, -t % products.block), (0, 0)))
    blocks = x.reshape(x.shape[0], -1, products.block, d)
    return jnp.transpose(blocks[:, :, ::-1] if reverse else blocks, (3, 1, 0, 2))


def _from_blocks(y: jax.Array, b: int, t: int) -> jax.Array:
    d, _, rows, _ = y.shape
    return jnp.transpose(y, (2, 1, 3, 0)).reshape(rows, -1, d)[:b, :t]
