"""Linear maps that learn while they read: gradient descent on a loss per token, in mini-batches, with momentum and
weight decay.

    G_t = k_t g_t^T,   g_t = dL_t / dz at z = W_0^T k_t,   W_0 the map before the mini-batch of token t
    M_t = eta_t M_{t-1} - theta_t G_t,   W_t = alpha_t W_{t-1} + M_t                                    per head

Without momentum and decay it is mini-batch TTT (Sun et al. 2024), with both the memory of Titans (Behrouz, Zhong &
Mirrokni 2025). Mini-batches are counted from a document's start, where W is `start` and M is 0.

A scan over chunks of as many tokens as a mini-batch has, wherever documents begin. A chunk holds the rest of the
mini-batch that enters it, at most one that follows it in the same document, and first mini-batches of other documents.
The second one's gradients need the map after the first. Then everything is known: with A_ti what is left at t of W at
i, and E_ij at i of what was added to M at j, W_t holds the writes of tokens j with the weights A E.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recollect.pallas_kernels.segments import segments_before

Gradient = Callable[[jax.Array, Any], jax.Array]
"""Maps predictions z (b, c, h, v) and the tokens' targets, a tree of (b, c, ...), to dL/dz."""


def online_descent(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    targets: Any,
    start: Float[Array, "h k v"],
    *,
    gradient: Gradient,
    index: Int[Array, "b t"],
    size: int,
    rate: Float[Array, "b t h"],
    log_momentum: Float[Array, "b t h"] | None = None,
    log_keep: Float[Array, "b t h"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b n h k v"] | None = None,
    initial_segment: Int[Array, " b"] | None = None,
    return_state: bool = False,
) -> tuple[tuple[Float[Array, "b t h v"], Float[Array, "b t h v"]], Float[Array, "b n h k v"] | None]:
    """Returns W_t^T q_t and W_0^T q_t, W_0 the map before the token's mini-batch.

    Args:
      q, k, rate: fp32 at least; rate is theta.
      targets: arrays (b, t, ...) that `gradient` takes beside predictions.
      start: W before a document.
      index: of each token within its document.
      size: tokens per mini-batch.
      log_momentum: log eta; None is eta = 0.
      log_keep: log alpha; None is alpha = 1.
      initial_state: W_0 and W after the last token and, with momentum, M.
    """
    b, t, h, _ = q.shape
    c = min(size, t)
    if segment_ids is None:
        real, continues = jnp.ones_like(index, dtype=bool), index > 0
    else:
        real, continues = segment_ids != 0, segment_ids == segments_before(segment_ids, initial_segment)
    numbers = {  # 0 is what entered the row; padding has that of the token before it
        "document": jnp.cumsum(real & ~continues, axis=1, dtype=index.dtype),
        "batch": jnp.cumsum(real & (~continues | (index % size == 0)), axis=1, dtype=index.dtype),
    }
    zeros = jnp.zeros_like(rate)
    rows = {"q": q, "k": k, "targets": targets, "rate": rate, "keep": zeros if log_keep is None else log_keep}
    if log_momentum is not None:
        rows["momentum"] = log_momentum
    rows = jax.tree.map(lambda x: jnp.where(real.reshape(b, t, *(1,) * (x.ndim - 2)), x, 0), rows)
    chunks = jax.tree.map(lambda x: _in_chunks(x, c), rows | {"real": real})
    chunks |= {name: _in_chunks(x, c, mode="edge") for name, x in numbers.items()}
    if initial_state is None:
        initial_state = jnp.stack([start, start] if log_momentum is None else [start, start, jnp.zeros_like(start)])
        initial_state = jnp.broadcast_to(initial_state, (b, *initial_state.shape))
    entered = jnp.zeros_like(index[:, 0])
    run = jax.checkpoint(functools.partial(_chunk, gradient, start.astype(q.dtype)), prevent_cse=False)
    (state, _, _), outs = jax.lax.scan(run, (initial_state.astype(q.dtype), entered, entered), chunks)
    now, before = (jnp.moveaxis(o, 0, 1).reshape(b, -1, h, o.shape[-1])[:, :t] for o in outs)
    return (now, before), state if return_state else None


def _in_chunks(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """(n, b, size, ...), with tokens at the end that do nothing."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk(gradient: Gradient, start: jax.Array, carry: Any, x: dict[str, Any]) -> tuple[Any, Any]:
    """One chunk after (state, document, batch) of the token before it, and its outputs."""
    state, document, batch = carry
    q, k, momentum = x["q"], x["k"], x.get("momentum")
    same = jnp.tril(x["document"][:, :, None] == x["document"][:, None])
    fresh = x["document"] != document[:, None]
    entering = x["batch"] == batch[:, None]
    following = ~entering & ~fresh

    def read(rows: jax.Array, weights: jax.Array) -> jax.Array:
        """What rows read from the weights that entered the chunk, or those before their document."""
        others = jnp.einsum("bthk,hkv->bthv", rows, start)
        return jnp.where(_wide(fresh), others, jnp.einsum("bthk,bhkv->bthv", rows, weights))

    # What is left of the weights and the momentum before the chunk or document, and of every token's write to them.
    kept, kept_from = _left(x["keep"], same)
    weighs, momentum_weighs = kept_from, None
    if momentum is not None:
        left, momentum_weighs = _left(momentum, same)
        left, counted = jnp.where(fresh[:, None], 0, left), kept_from * x["real"][:, None, None]
        of_momentum, weighs = jnp.einsum("bhti,bhi->bht", counted, left), counted @ momentum_weighs

    def at(token: jax.Array, written: jax.Array) -> tuple[jax.Array, ...]:
        """Weights and momentum after a token (b,)."""
        place = token[:, None, None]
        here: dict[str, Any] = {"kept": kept, "weighs": weighs}
        if momentum is not None:
            here |= {"left": left, "of_momentum": of_momentum, "momentum_weighs": momentum_weighs}
        here = {
            name: jnp.take_along_axis(y, place.reshape(-1, *(1,) * (y.ndim - 1)), axis=2)[:, :, 0]
            for name, y in here.items()
        }
        before = jnp.where(_wide(jnp.take_along_axis(fresh, token[:, None], axis=1)), start, state[:, 1])
        weights = here["kept"][..., None, None] * before + _written(here["weighs"], k, written)
        if momentum is None:
            return (weights,)
        weights = weights + here["of_momentum"][..., None, None] * state[:, 2]
        return weights, here["left"][..., None, None] * state[:, 2] + _written(here["momentum_weighs"], k, written)

    def written(predictions: jax.Array) -> jax.Array:
        return -x["rate"][..., None] * gradient(predictions, x["targets"])

    first = written(read(k, state[:, 0]))
    last_entering = jnp.max(jnp.where(entering, jnp.arange(entering.shape[1]), 0), axis=1)
    middle = at(last_entering, first)[0]
    middle = jnp.where(jnp.any(entering, axis=1)[:, None, None, None], middle, state[:, 1])
    writes = jnp.where(_wide(following), written(jnp.einsum("bthk,bhkv->bthv", k, middle)), first)

    scores = jnp.einsum("bthk,bjhk->bhtj", q, k) * weighs
    now = jnp.moveaxis(kept, 1, 2)[..., None] * read(q, state[:, 1]) + jnp.einsum("bhtj,bjhv->bthv", scores, writes)
    if momentum is not None:
        now += jnp.moveaxis(of_momentum, 1, 2)[..., None] * jnp.einsum("bthk,bhkv->bthv", q, state[:, 2])
    before = jnp.where(_wide(following), jnp.einsum("bthk,bhkv->bthv", q, middle), read(q, state[:, 0]))
    base = jnp.where(_wide(following[:, -1:]), middle, state[:, 0])
    base = jnp.where(_wide(fresh[:, -1:]), start, base)
    last = jnp.full_like(batch, k.shape[1] - 1)
    state = jnp.stack([base, *at(last, writes)], axis=1)
    return (state, x["document"][:, -1], x["batch"][:, -1]), (now, before)


def _wide(mask: jax.Array) -> jax.Array:
    """(b, t, 1, 1)."""
    return mask[:, :, None, None]


def _left(log_factors: jax.Array, same: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The products of factors (b, t, h) up to each token: from its document's or the chunk's start (b, h, t), and from
    every token before it in its document (b, h, t, i)."""
    total = jnp.moveaxis(jnp.cumsum(log_factors, axis=1), 1, 2)
    between = jnp.where(same[:, None], total[..., :, None] - total[..., None, :], -jnp.inf)
    from_start = jnp.einsum("bti,bih->bht", same.astype(log_factors.dtype), log_factors)
    return jnp.exp(from_start), jnp.exp(between)


def _written(weights: jax.Array, k: jax.Array, writes: jax.Array) -> jax.Array:
    return jnp.einsum("bhj,bjhk,bjhv->bhkv", weights, k, writes)
