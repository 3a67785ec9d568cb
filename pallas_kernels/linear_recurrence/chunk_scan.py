"""Scans over chunks of tokens, of which all kernels of the recurrence and of its gradients are made.

`ChunkScan` is causal attention without softmax. Forward, with S (k, v) the state before a chunk of c tokens,

    o_i = scale (reads_i . q_i S + sum_{j <= i} pair_ij (q_i . k_j) v_j)          S' = keep . S + sum_j writes_j . k_j v_j^T

and in reverse, from the last chunk to the first, with j >= i in the sum. The gradients of such a product are such
products:

    dq = scan(do, v, k),    dk = scan(v, do, q) in reverse,    dv = scan(k, q, do) in reverse.

`DeltaScan` adds an erased part, which depends on the state: y = u - w S is written in place of v.

Weights come from `Chunks`. With G = total, its value at a chunk's last token G_c, and no documents,

    forward       pair_ij = exp(G_i - G_j)    reads_i = exp(G_i)          writes_j = exp(G_c - G_j)    keep = exp(G_c)
    in reverse    pair_ij = exp(G_j - G_i)    reads_i = exp(G_c - G_i)    writes_j = exp(G_j)          keep = exp(G_c)

pair_ii is the constant 1. A decay per channel acts inside the products: "key" on the channels of q, k and the rows of
S, "value" on the channels of v, o and the columns of S. With documents, pair_ij is 0 across documents; forward, reads
are multiplied by `starts` and writes by `ends`, in reverse the other way round; keep by `keeps`.

tpu.py and gpu.py provide `ScanKernels`: both scans, and `Solve` and `SolveTransposed`, which make what a delta scan
takes. The GPU's scan is a `PairedScan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from recollect.pallas_kernels.linear_recurrence.recurrence import Decay

# Kernels multiply by exp(g) of up to 8 tokens from either side of a reference: 8 x 10 is what fp32 holds. e^-10 is
# below what bf16 resolves.
STRONGEST_CHANNEL_DECAY = -10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """How the tokens of one call are weighted; t is a multiple of `size`.

    Attributes:
      size: c, tokens per chunk.
      decay: where the decay acts.
      total: fp32 running sum of the log decay inside each chunk, the token's own included: None for "none", (b, h, t)
        for "head", (b, t, h, k) for "key", (b, t, h, v) for "value". h counts the output's heads.
      segments: (b, t) int32, padding taking the segment before it; None is one document, and then the next three are
        None.
      starts: (b, t) fp32, 1 where a token belongs to the segment of the state before its chunk, else 0.
      ends: (b, t) fp32, 1 where it belongs to the segment of its chunk's last token, else 0.
      keeps: (b, t / c) fp32, 1 where these two segments are the same, else 0.
    """

    size: int = dataclasses.field(metadata={"static": True})
    decay: Decay = dataclasses.field(default="none", metadata={"static": True})
    total: jax.Array | None = None
    segments: jax.Array | None = None
    starts: jax.Array | None = None
    ends: jax.Array | None = None
    keeps: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanResult:
    """What a scan returns.

    Attributes:
      o: (b, t, h, v), or None.
      state: (b, h, k, v) fp32, after the last chunk of the scan.
      dots: (b, h, t) fp32, sum_v o dot_with from o before it is rounded, or None.
      checkpoints: (b, h, m, k, v) fp32, or None: the state with which the scan enters each group of `checkpoint_every`
        chunks, numbered as they are stored; the last group may be short.
      y: (b, t, h, v), of a delta scan alone.
      second_o, second_dots: as o and dots, of a paired scan with second_q alone.
    """

    o: jax.Array | None
    state: jax.Array
    dots: jax.Array | None = None
    checkpoints: jax.Array | None = None
    y: jax.Array | None = None
    second_o: jax.Array | None = None
    second_dots: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What `DeltaScan` takes, w (b, t, h, k) and u (b, t, h, v); inverse, A as the backend keeps it, or None; total,
    what `Chunks` lacked."""

    w: jax.Array
    u: jax.Array
    inverse: jax.Array | None = None
    total: jax.Array | None = None


class ChunkScan(Protocol):
    """See the module. q (b, t, hq, k), k (b, t, hk, k), v (b, t, hv, v): each count of heads divides `heads`, the
    output's, and output head h reads head h // (heads / count). dot_with (b, t, hx, v) likewise. strict leaves j = i
    out."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        chunks: Chunks,
        *,
        heads: int,
        scale: float = 1.0,
        initial_state: jax.Array | None = None,
        reverse: bool = False,
        strict: bool = False,
        dot_with: jax.Array | None = None,
        checkpoint_every: int | None = None,
        out_dtype: jax.typing.DTypeLike | None = None,
    ) -> ScanResult: ...


class PairedScan(Protocol):
    """`ChunkScan`, two in one, for decays "none" and "head". Either it writes a second pair (second_k, second_v), times
    second_scale,

        o_i = scale (reads_i . q_i S + sum_j pair_ij ((q_i . k_j) v_j + second_scale (q_i . second_k_j) second_v_j)),

    where strict leaves j = i out of the first products alone; or it reads for second queries too, j = i left out of
    theirs: second_o_i = second_scale (reads_i . second_q_i S + sum pair_ij (second_q_i . k_j) v_j), and its dots with
    second_dot_with."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        chunks: Chunks,
        *,
        heads: int,
        scale: float = 1.0,
        initial_state: jax.Array | None = None,
        reverse: bool = False,
        strict: bool = False,
        dot_with: jax.Array | None = None,
        checkpoint_every: int | None = None,
        out_dtype: jax.typing.DTypeLike | None = None,
        second: tuple[jax.Array, jax.Array] | None = None,
        second_q: jax.Array | None = None,
        second_dot_with: jax.Array | None = None,
        second_scale: float = 1.0,
    ) -> ScanResult: ...


class DeltaScan(Protocol):
    """y_i = u_i - w_i S and S' = keep . S + sum_j writes_j . (k_j y_j^T + scale second_k_j second_v_j^T), w and u (b,
    t, heads, k or v) holding their weights already. With q, o_i = scale (reads_i . q_i S + sum pair_ij (q_i . k_j) y_j)
    as in `ChunkScan`; without, o is None. y, None without keeps_y, and o have u's dtype. k, q, second_k, second_v have head
    counts that divide `heads`. decay "value" does not occur."""

    def __call__(
        self,
        w: jax.Array,
        u: jax.Array,
        k: jax.Array,
        chunks: Chunks,
        *,
        heads: int,
        q: jax.Array | None = None,
        second: tuple[jax.Array, jax.Array] | None = None,
        scale: float = 1.0,
        initial_state: jax.Array | None = None,
        reverse: bool = False,
        checkpoint_every: int | None = None,
        keeps_y: bool = True,
    ) -> ScanResult: ...


class Solve(Protocol):
    """w = A (reads . e) and u = A (strength . v), with A = (I + L)^-1 and L_ij = pair_ij (e_i . k_j) for j < i
    in each chunk.

    e (b, t, he, k), k (b, t, hk, k), v (b, t, hv, v), head counts as in `ChunkScan`; strength (b, t, heads), None is 1.
    keeps: whether A is returned. log_decay (b, t, heads, k) fp32: of decay "key" alone, whose `Chunks` have no total
    yet; what is below STRONGEST_CHANNEL_DECAY counts as that. Decay "value" does not occur."""

    def __call__(
        self,
        e: jax.Array,
        k: jax.Array,
        v: jax.Array,
        chunks: Chunks,
        *,
        heads: int,
        strength: jax.Array | None = None,
        log_decay: jax.Array | None = None,
        keeps: bool = True,
    ) -> Solution: ...


class SolveTransposed(Protocol):
    """w = A^T (writes . k) and u = scale A^T P^T do, with the forward direction's weights, A the inverse that `Solve`
    returned and P_ij = pair_ij (q_i . k_j) for j <= i in each chunk."""

    def __call__(
        self,
        inverse: jax.Array,
        q: jax.Array,
        k: jax.Array,
        do: jax.Array,
        chunks: Chunks,
        *,
        heads: int,
        scale: float = 1.0,
    ) -> Solution: ...


@dataclasses.dataclass(frozen=True)
class ScanKernels:
    """A backend's kernels, what they refuse, and its choice of chunk.

    Attributes:
      chunk_size: (decay, erase, key_dim, value_dim, dtype) -> tokens per chunk.
      refuses: (key_dim, value_dim, dtype, decay, erase) -> why it cannot serve such heads, or None.
      paired_scan: None where there is none.
    """

    scan: ChunkScan
    delta_scan: DeltaScan
    solve: Solve
    solve_transposed: SolveTransposed
    chunk_size: Callable[[Decay, bool, int, int, Any], int]
    refuses: Callable[[int, int, Any, Decay, bool], str | None] = lambda *_: None
    paired_scan: PairedScan | None = None
