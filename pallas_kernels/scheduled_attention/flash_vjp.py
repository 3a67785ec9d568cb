"""Softmax attention over scheduled tiles: what the kernel forms share, gradients and padding included.

    o_i = sum_j w_ij v_j,   w_ij = exp(s_ij - lse_i),   lse_i = log(exp(z_h) + sum over allowed j of exp(s_ij)),   s_ij = scale q_i . k_j

With g and dlse the cotangents of o and lse and delta_i = g_i . o_i - dlse_i,

    ds_ij = w_ij (g_i . v_j - delta_i)    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i w_ij g_i
    dz_h = -sum_i exp(z_h - lse_i) delta_i

(FlashAttention-2, Dao 2023, section 3.1, whose backward takes a sink, or anything else that went into lse, without
knowing). Nothing of size (t, s) is stored. dq is summed by walking over keys, dk and dv by walking over queries, so
that no sum is shared by two cores.

With `block`, keys come in landmark blocks, one a tile: `block` ordinary keys, their landmark, and slots that nothing
reads. A block then is one super-token (Mohtashami & Jaggi 2023, section 3.1), whose score is its landmark's and whose
value is an inner softmax's average: with n_j the softmax over the block's ordinary scores, P = exp(s_landmark - lse)
and D = sum_j n_j g . v_j,

    w_j = P n_j,   lse over landmarks alone,   ds_j = P n_j (g . v_j - D),   ds_landmark = P (D - delta),

and dq, dk, dv are sums as above, the landmark being one of the keys whose weight is 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from recollect.pallas_kernels.masks import Mask
from recollect.pallas_kernels.scheduled_attention.block_schedule import (
    Fields,
    Visits,
    block_schedule,
    needed,
    padded_fields,
)

MASKED_LSE = 1e30
"""Stands for the log-sum-exp of a query that sees nothing when weights are made again: exp(s - 1e30) is 0."""


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """What is constant in a call. Lengths are multiples of the tiles.

    block: None, or ordinary keys a landmark block; a tile of keys then is one block: slots 0 .. block - 1 hold them,
    slot `block` the landmark, and
    the others zeros. A tile is allowed or not as a whole a query: all its slots have the same fields.
    """

    mask: Mask
    scale: float
    query_tile: int
    key_tile: int
    block: int | None = None


class Kernels(Protocol):
    """What tpu.py and gpu.py provide.

    q (b, n, h, k), k (b, s, g, k), v (b, s, g, v), h a multiple of g: query head i attends with key head i // (h / g),
    unless `key_heads` (b, n / query_tile) int32 names one for each tile of queries (then h is 1). Fields: name -> (b or
    1, n) and (b or 1, s) int32, those that `schedule.tile_allows` reads; it is asked on tiles that `visits` calls
    partial, and on no other. lse and delta: (b, h, n) fp32.
    """

    def forward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None,
        visits: Visits,
        key_heads: jax.Array | None,
        query_fields: Fields,
        key_fields: Fields,
        settings: AttentionSettings,
    ) -> tuple[jax.Array, jax.Array]:
        """o (b, n, h, v) in q's dtype and lse (b, h, n); zeros and -inf for a query that sees nothing. sinks: (h,)
        fp32."""

    def query_gradient(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        do: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        visits: Visits,
        key_heads: jax.Array | None,
        query_fields: Fields,
        key_fields: Fields,
        settings: AttentionSettings,
    ) -> jax.Array:
        """dq in q's dtype. lse is finite: MASKED_LSE where nothing is seen. do is in q's dtype."""

    def key_gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        do: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        visits: Visits,
        key_heads: jax.Array | None,
        query_fields: Fields,
        key_fields: Fields,
        settings: AttentionSettings,
    ) -> tuple[jax.Array, jax.Array]:
        """dk, dv in the dtypes of k and v. visits: those of the transposed schedule, for each tile of keys its tiles
        of queries."""


class KernelModule(Kernels, Protocol):
    """All that a module of kernels provides to the operations."""

    def refuses(
        self, q: Any, k: Any, v: Any, *, block: int | None = None, window: int | None = None, gathered: bool = False
    ) -> str | None:
        """Why it cannot serve a call of these shapes and dtypes; None if it can. gathered: whether tiles of queries
        name their key heads."""

    def tile_sizes(
        self, n: int, s: int, k: int, v: int, dtype: Any, *, window: int | None = None, block: int | None = None
    ) -> tuple[int, int]:
        """Queries and keys a tile, for n queries and s keys of k and v dimensions. window: keys that a query sees near
        it, if so few. block: as in AttentionSettings; the tile of keys then has room for it."""


def attend(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    query_fields: Fields,
    key_fields: Fields,
    scale: float,
    query_tile: int,
    key_tile: int,
    sinks: jax.Array | None = None,
    key_heads: jax.Array | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The operation by a module's kernels.

    Args:
      q, k, v, key_heads, sinks: see Kernels; any n and s. Padding must hold finite numbers.
      query_fields, key_fields: name -> (b or 1, n) and (b or 1, s) int; numpy arrays are known at trace time. Segment 0
        is padding.
      block: see AttentionSettings; s is then a multiple of key_tile, and there are no sinks.

    Returns:
      o (b, n, h, v) in q's dtype, and lse (b, n, h) fp32, -inf for queries that see nothing.

    Raises:
      ValueError: the mask reads a field that is missing.
    """
    n, s = q.shape[1], k.shape[1]
    sizes = (n + -n % query_tile, s + -s % key_tile)
    query_fields, key_fields = padded_fields(query_fields, key_fields, (n, s), sizes)
    q = _padded(q, -n % query_tile)
    k, v = (_padded(x, -s % key_tile) for x in (k, v))
    settings = AttentionSettings(mask, float(scale), query_tile, key_tile, block)
    static = [_Known(fields) for fields in (query_fields, key_fields)]
    traced = [
        {name: x for name, x in fields.items() if not isinstance(x, np.ndarray)}
        for fields in (query_fields, key_fields)
    ]
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    o, lse = _attention(kernels, settings, *static, q, k, v, sinks, key_heads, *traced)
    return o[:, :n], jnp.swapaxes(lse, 1, 2)[:, :n]


class _Known:
    """Fields known at trace time, hashable."""

    def __init__(self, fields: Fields):
        self.fields = {name: x for name, x in fields.items() if isinstance(x, np.ndarray)}
        self.key = tuple((name, x.shape, x.tobytes()) for name, x in sorted(self.fields.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _padded(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, size), (0, 0), (0, 0))) if size else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(kernels, settings, known_query, known_key, q, k, v, sinks, key_heads, query_fields, key_fields):
    return _forward(kernels, settings, known_query, known_key, q, k, v, sinks, key_heads, query_fields, key_fields)[0]


def _forward(kernels, settings, known_query, known_key, q, k, v, sinks, key_heads, query_fields, key_fields):
    query, key, schedule = _scheduled(
        settings, known_query, known_key, query_fields, key_fields, (q.shape[1], k.shape[1])
    )
    o, lse = kernels.forward(q, k, v, sinks, schedule.visits(), key_heads, query, key, settings)
    return (o, lse), (q, k, v, sinks, key_heads, query_fields, key_fields, o, lse)


def _backward(kernels, settings, known_query, known_key, kept, cotangents):
    q, k, v, sinks, key_heads, query_fields, key_fields, o, lse = kept
    do, d_lse = cotangents
    query, key, schedule = _scheduled(
        settings, known_query, known_key, query_fields, key_fields, (q.shape[1], k.shape[1])
    )
    delta = jnp.einsum("bnhv,bnhv->bhn", do, o, preferred_element_type=jnp.float32) - jnp.where(
        jnp.isfinite(lse), d_lse, 0
    )
    finite = jnp.where(jnp.isfinite(lse), lse, MASKED_LSE)
    rest = (key_heads, query, key, settings)
    do = do.astype(q.dtype)
    dq = kernels.query_gradient(q, k, v, do, finite, delta, schedule.visits(), *rest)
    transposed = schedule.transposed(key_heads, k.shape[2])
    dk, dv = kernels.key_gradients(q, k, v, do, finite, delta, transposed, *rest)
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[:, None] - finite) * delta, axis=(0, 2))
    return dq, dk, dv, d_sinks, None, None, None


_attention.defvjp(_forward, _backward)


def _scheduled(settings, known_query, known_key, query_fields, key_fields, lengths):
    sides = ((known_query, query_fields), (known_key, key_fields))
    query, key = (needed(settings.mask, {**known.fields, **fields}) for known, fields in sides)
    return query, key, block_schedule(settings.mask, query, key, lengths, (settings.query_tile, settings.key_tile))
