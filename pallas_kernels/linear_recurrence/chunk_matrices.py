"""Lower triangular matrices of a chunk: decayed products of its tokens, and the inverse of a unit triangular one.

Both are put together from halves: of a block of tokens, the later half against the earlier one is a full square, and
each half by itself is a block half as long. Everything is a matrix product, so nothing loops over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from recollect.pallas_kernels.linear_recurrence.chunk_scan import STRONGEST_CHANNEL_DECAY

SMALL = 8
"""Squares below this size are sums of products, not matrix products: on CPU a product of 2 x 2 costs a hundred times
its arithmetic."""


def decayed_products(
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    g: jax.Array | None,
    masks: Sequence[jax.Array | None],
    dtype,
) -> list[list[jax.Array]]:
    """sum_c rows_ic exp(g_{j+1,c} + ... + g_ic) columns_jc for j <= i, else 0: each of `rows` with each of `columns`.

    A decay per channel cannot be taken out of the sum, and exp(-g) by itself overflows. Between the later and the
    earlier half of a block both factors, the decay since the later half began and the decay to the earlier half's end,
    are at most 1, and where one underflows the product would have. Sums are taken between the two tokens alone: the
    difference of two running sums would be as wrong as their rounding, which a strong decay anywhere before makes
    large.

    Args:
      rows, columns: (b, n, c, h, k) each. With a decay c is a power of two.
      g: log decay, (b, n, c, h, 1) or (b, n, c, h, k); None is none.
      masks: for each of `rows` what to keep besides j <= i, broadcasts to (b, n, h, c, c); None keeps all.

    Returns:
      (b, n, h, c, c) each, in `dtype`.
    """
    index = jnp.arange(rows[0].shape[2])
    causal = index[:, None] >= index
    kept = [causal if mask is None else mask & causal for mask in masks]
    if g is not None and g.shape[-1] > 1:
        products = _products_by_channel(rows, columns, g, dtype)
        return [[jnp.where(mask, each, 0) for each in of_row] for mask, of_row in zip(kept, products, strict=True)]
    between = None if g is None else _between(jnp.moveaxis(g[..., 0], 3, 2))

    def product(row: jax.Array, column: jax.Array, mask: jax.Array) -> jax.Array:
        scores = jnp.einsum("bnihk,bnjhk->bnhij", row, column, preferred_element_type=dtype)
        if between is None:
            return jnp.where(mask, scores, 0)
        return scores * jnp.exp(jnp.where(mask, between, -jnp.inf))

    return [[product(row, column, mask) for column in columns] for row, mask in zip(rows, kept, strict=True)]


def token_after(rows: jax.Array) -> jax.Array:
    """The rows (b, n, c, h, k) of the token after each in its chunk. `decayed_products` of those are, once
    `of_token_before` has moved them back, products in which token i reads what it has not decayed yet:

    sum_c rows_ic exp(g_{j+1,c} + ... + g_{i-1,c}) columns_jc for j < i.
    """
    return jnp.pad(rows[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))


def of_token_before(products: jax.Array, mask: jax.Array) -> jax.Array:
    """Products (b, n, h, c, c) whose row i is that of the token before, 0 where `mask` does not keep it."""
    return jnp.where(mask, jnp.pad(products[..., :-1, :], [(0, 0)] * (products.ndim - 2) + [(1, 0), (0, 0)]), 0)


def decayed_sums(matrix: jax.Array, x: jax.Array, g: jax.Array, dtype) -> jax.Array:
    """sum_{j<=i} matrix_ij exp(g_{j+1,c} + ... + g_ic) x_jc: a matrix (b, n, h, i, j) applied to x (b, n, j, h, c),
    whose channels decay.

    By halves, as in `decayed_products`: both factors of a pair's decay are at most 1.

    Args:
      g: log decay, (b, n, c, h, channels) as x; c is a power of two.

    Returns:
      (b, n, i, h, c), in `dtype`.
    """
    b, n, c, h, _ = x.shape
    diagonal = jnp.moveaxis(jnp.diagonal(matrix, axis1=3, axis2=4), 3, 2)[..., None]
    total = diagonal.astype(dtype) * x.astype(dtype)
    half = 1
    while half < c:
        m = c // (2 * half)
        decay, early = (y.reshape(b, n, m, 2, half, h, -1) for y in (g, x))
        early = (early[:, :, :, 0] * jnp.exp(to_end(decay[:, :, :, 0], 3))).astype(x.dtype)
        squares = _squares(matrix, half).astype(x.dtype)
        late = jnp.einsum("bnhmij,bnmjhv->bnmihv", squares, early, preferred_element_type=dtype)
        late = late * jnp.exp(jnp.cumsum(decay[:, :, :, 1], axis=3))
        blocks = total.reshape(b, n, m, 2, half, h, -1)
        total = jnp.stack([blocks[:, :, :, 0], blocks[:, :, :, 1] + late], axis=3).reshape(total.shape)
        half *= 2
    return total


def before_decay(g: jax.Array) -> jax.Array:
    """Each token's log decay moved to the token after it in its chunk: running sums of it leave a token's own decay
    out."""
    return jnp.pad(g[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))


def since_start(g: jax.Array) -> jax.Array:
    """Log decay from before a chunk's first token to each token, (b, n, c, h, k)."""
    return jnp.cumsum(g, axis=2)


def running_total(g: jax.Array, size: int) -> jax.Array:
    """Chunks.total of a log decay by channel (b, t, h, k), fp32, in chunks of `size` tokens."""
    g = jnp.maximum(g, STRONGEST_CHANNEL_DECAY)
    return since_start(g.reshape(g.shape[0], -1, size, *g.shape[2:])).reshape(g.shape)


def to_end(g: jax.Array, axis: int = 2) -> jax.Array:
    """Log decay from each token to the chunk's last, which is exactly 0 for that one; tokens are on `axis`."""
    later = jax.lax.slice_in_dim(g, 1, None, axis=axis)
    later = jnp.pad(later, [(0, int(i == axis)) for i in range(g.ndim)])
    return jax.lax.cumsum(later, axis=axis, reverse=True)


@jax.custom_vjp
def unit_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 for strictly lower triangular L (..., c, c), fp32 or wider.

    [[A, 0], [X, B]]^-1 = [[A^-1, 0], [-B^-1 X A^-1, B^-1]], from blocks of one token up. No power of L is formed: those
    can overflow where the inverse does not.
    """
    c = lower.shape[-1]
    size = 1 << (c - 1).bit_length()
    if size != c:
        lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, size - c)] * 2)
    lead = lower.shape[:-2]
    inverse = jnp.ones((*lead, size, 1, 1), lower.dtype)
    half = 1
    while half < size:
        squares = _squares(lower, half)
        blocks = inverse.reshape(*lead, size // (2 * half), 2, half, half)
        early, late = blocks[..., 0, :, :], blocks[..., 1, :, :]
        corner = -_matmul(_matmul(late, squares), early)
        inverse = _joined(early, corner, late)
        half *= 2
    return inverse.reshape(*lead, size, size)[..., :c, :c]


def unit_inverse_by_ladder(lower: jax.Array) -> jax.Array:
    """`unit_inverse` in products of whole matrices, without a gradient: X <- X - X L' X, L' the squares of one size,
    from 1 up.

    Twice log2(c) products of c x c are what matrix units do in no time; the halves' many small ones take their
    compilers minutes. On two CPU cores it is the slower one, by five.
    """
    c = lower.shape[-1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))

    def level(n, inverse):
        # Where the highest bit that differs is this one, the two are in neighbouring blocks of one block twice as long.
        squares = jnp.where(jax.lax.shift_right_logical(row ^ column, n) == 1, lower, 0)
        return inverse - _matmul(_matmul(inverse, squares), inverse)

    start = jnp.broadcast_to(jnp.where(row == column, 1.0, 0.0).astype(lower.dtype), lower.shape)
    return jax.lax.fori_loop(0, (c - 1).bit_length(), level, start)


def _unit_inverse_forward(lower):
    inverse = unit_inverse(lower)
    return inverse, inverse


def _unit_inverse_backward(inverse, gradient):
    # Of X = (I + L)^-1: dL = -X^T dX X^T, where L has entries.
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (jnp.tril(-_matmul(_matmul(transposed, gradient), transposed), -1),)


unit_inverse.defvjp(_unit_inverse_forward, _unit_inverse_backward)


def _products_by_channel(rows, columns, g, dtype):
    # Heads before tokens: with an axis of one head after them, XLA's CPU compiler dies of the gradient under vmap.
    rows, columns = ([jnp.moveaxis(x, 3, 2) for x in side] for side in (rows, columns))
    g = jnp.moveaxis(g, 3, 2)
    *shape, c, k = g.shape
    rows, columns = ([x.reshape(-1, c, k) for x in side] for side in (rows, columns))
    g = g.reshape(-1, c, k)

    def start(row, column):
        return jnp.sum((row * column).astype(dtype), axis=-1)[..., None, None]

    def joined(lower, row, column):
        half = row.shape[-2]
        if half < SMALL:
            square = jnp.sum((row[..., :, None, :] * column[..., None, :, :]).astype(dtype), axis=-1)
        else:
            square = jnp.einsum("...ik,...jk->...ij", row, column, preferred_element_type=dtype)
        blocks = lower.reshape(-1, c // (2 * half), 2, half, half)
        return _joined(blocks[..., 0, :, :], square, blocks[..., 1, :, :])

    lowers, half = [[start(row, column) for column in columns] for row in rows], 1
    while half < c:
        # A size's exponentials serve all products, so that each size adds two terms to the gradient of g, not two for
        # every product: XLA's CPU backend takes long for long sums.
        sizes = (-1, c // (2 * half), 2, half, k)
        decay = g.reshape(sizes)
        since, rest = jnp.exp(since_start(decay[:, :, 1])), jnp.exp(to_end(decay[:, :, 0]))
        later = [(x.reshape(sizes)[:, :, 1] * since).astype(x.dtype) for x in rows]
        earlier = [(x.reshape(sizes)[:, :, 0] * rest).astype(x.dtype) for x in columns]
        lowers = [
            [joined(lower, row, column) for lower, column in zip(of_row, earlier, strict=True)]
            for of_row, row in zip(lowers, later, strict=True)
        ]
        half *= 2
    return [[lower.reshape(*shape, c, c) for lower in of_row] for of_row in lowers]


def _between(g: jax.Array) -> jax.Array:
    """g_{j+1} + ... + g_i for j < i, else 0: g (b, n, h, c) gives (b, n, h, c, c)."""
    lead, c = g.shape[:-1], g.shape[-1]
    lower = jnp.zeros((*lead, c, 1, 1), g.dtype)
    # Of each token in its block, from the block's start and to its end. From blocks half as long, not by cumsum: XLA's
    # CPU compiler takes minutes for the gradient of sums of every length in one program.
    since, rest = g[..., None], jnp.zeros_like(g)[..., None]
    half = 1
    while half < c:
        m = c // (2 * half)
        since, rest = (x.reshape(*lead, m, 2, half) for x in (since, rest))
        blocks = lower.reshape(*lead, m, 2, half, half)
        corner = since[..., 1, :, None] + rest[..., 0, None, :]
        lower = _joined(blocks[..., 0, :, :], corner, blocks[..., 1, :, :])
        total = since[..., -1:]
        since = jnp.concatenate([since[..., 0, :], since[..., 1, :] + total[..., 0, :]], axis=-1)
        rest = jnp.concatenate([rest[..., 0, :] + total[..., 1, :], rest[..., 1, :]], axis=-1)
        half *= 2
    return lower.reshape(*lead, c, c)


def _squares(matrix: jax.Array, half: int) -> jax.Array:
    """Of each diagonal block of 2 half tokens, later rows by earlier columns: (..., size / (2 half), half, half)."""
    lead, size = matrix.shape[:-2], matrix.shape[-1]
    m = size // (2 * half)
    blocks = matrix.reshape(*lead, m, 2, half, m, 2, half)[..., :, 1, :, :, 0, :]
    return jnp.einsum("...mimj->...mij", blocks)


def _joined(early: jax.Array, corner: jax.Array, late: jax.Array) -> jax.Array:
    """[[early, 0], [corner, late]] of (..., half, half) each."""
    top = jnp.concatenate([early, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, late], axis=-1)], axis=-2)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
