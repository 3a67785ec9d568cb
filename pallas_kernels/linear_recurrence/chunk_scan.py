"""Walks over chunks of tokens, out of which every kernel form of the recurrence and of its gradients is made.

`walk` is causal attention without softmax. Forwards, with S (k, v) the state before a chunk of c tokens,

    o_i = scale (reads_i . q_i S + sum_{j <= i} pair_ij (q_i . k_j) v_j)          S' = keep . S + sum_j writes_j . k_j v_j^T

and in reverse, from the last chunk to the first, with j >= i in the sum. The gradients of such a product are such
products:

    dq = walk(do, v, k),    dk = walk(v, do, q) in reverse,    dv = walk(k, q, do) in reverse.

`delta_walk` adds an erased part, which depends on the state: y = u - w S is written in place of v.

Weights come from `Chunks`. With G = total, its value at a chunk's last token G_c, and no documents,

    forwards      pair_ij = exp(G_i - G_j)    reads_i = exp(G_i)          writes_j = exp(G_c - G_j)    keep = exp(G_c)
    in reverse    pair_ij = exp(G_j - G_i)    reads_i = exp(G_c - G_i)    writes_j = exp(G_j)          keep = exp(G_c)

pair_ii is the constant 1. A decay per channel acts inside the products: "key" on the channels of q, k and the rows of
S, "value" on the channels of v, o and the columns of S. With documents, pair_ij is 0 across documents; forwards reads
are multiplied by `starts`, writes by `ends`, in reverse the other way round; keep by `keeps`.

A kernel module (tpu.py, gpu.py) provides both, and `solve` and `solve_transposed`, which make what `delta_walk` takes,
with the signatures below; gpu.py's walk is a `JoinedWalk`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import jax

Decay = Literal["none", "head", "key", "value"]
# Kernels multiply by exp(g) of up to 8 tokens from either side of a reference: 8 x 10 is what fp32 holds. e^-10 is
# below what bf16 resolves.
STRONGEST_CHANNEL_DECAY = -10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """How the tokens of one call weigh on each other; t is a multiple of `size`.

    Attributes:
      size: c, tokens a chunk.
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
class Walked:
    """o (b, t, h, v); dots (b, h, t) fp32, sum_v o dot_with from o before it is rounded, or None; state (b, h, k, v)
    fp32 after the last chunk walked; checkpoints (b, h, m, k, v) fp32, or None: groups of `checkpoint_every` chunks
    (the last may be short), numbered as they are stored, and the state with which the walk enters each; y (b, t, h, v),
    of `delta_walk` alone; second_o and second_dots like o and dots, of `JoinedWalk` with second_q alone."""

    o: jax.Array | None
    state: jax.Array
    dots: jax.Array | None = None
    checkpoints: jax.Array | None = None
    y: jax.Array | None = None
    second_o: jax.Array | None = None
    second_dots: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solved:
    """What `delta_walk` takes, w (b, t, h, k) and u (b, t, h, v); inverse, A as the backend keeps it, or None;
    total, what `Chunks` lacked."""

    w: jax.Array
    u: jax.Array
    inverse: jax.Array | None = None
    total: jax.Array | None = None


class Walk(Protocol):
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
    ) -> Walked: ...


class JoinedWalk(Protocol):
    """`Walk`, two in one, for decays "none" and "head". Either writes a second pair (second_k, second_v), times
    second_scale,

        o_i = scale (reads_i . q_i S + sum_j pair_ij ((q_i . k_j) v_j + second_scale (q_i . second_k_j) second_v_j)),

    where strict leaves j = i out of the first products alone; or reads for second queries too, j = i left out of
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
    ) -> Walked: ...


class DeltaWalk(Protocol):
    """y_i = u_i - w_i S and S' = keep . S + sum_j writes_j . (k_j y_j^T + scale second_k_j second_v_j^T), w and u (b,
    t, heads, k or v) holding their weights already. With q, o_i = scale (reads_i . q_i S + sum pair_ij (q_i . k_j) y_j)
    as in `Walk`; without, o is None. y, None without keeps_y, and o have u's dtype. k, q, second_k, second_v have head
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
    ) -> Walked: ...


class Solve(Protocol):
    """w = A (reads . e) and u = A (strength . v) forwards, with A = (I + L)^-1 and L_ij = pair_ij (e_i . k_j) for j < i
    in each chunk.

    e (b, t, he, k), k (b, t, hk, k), v (b, t, hv, v), head counts as in `Walk`; strength (b, t, heads), None is 1.
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
    ) -> Solved: ...


class SolveTransposed(Protocol):
    """w = A^T (writes . k) and u = scale A^T P^T do, weights being those of forwards, with A the inverse that `Solve`
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
    ) -> Solved: ...
