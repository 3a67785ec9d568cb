"""Cross-entropy of a linear head, without the (tokens x vocabulary) array of logits in memory.

    s = h W,   lse = log sum_v exp(s_v),   loss = lse - s_target,   total = sum over targets of w (loss + z lse^2)

z is the weight of the z-loss (Chowdhery et al. 2022, section 5). Where gradients are asked for they are made in the
forward pass, chunk by chunk, while the logits are there, and scaled in the backward pass (Hsu et al. 2024, Liger
Kernel, section 3.2): three products instead of the four of recomputing the logits.

Easy to get wrong: an answer is right when no other logit is as large, so ties are wrong; `total` alone has gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recollect.pallas_kernels.dispatch import choose


class CrossEntropy(NamedTuple):
    """total () has gradients; loss, lse (b, t), in nats, and correct (b, t) bool have none. fp32 (fp64 for fp64
    inputs)."""

    total: Float[Array, ""]
    loss: Float[Array, "b t"]
    lse: Float[Array, "b t"]
    correct: Bool[Array, "b t"]


BACKENDS = {
    "xla": "recollect.pallas_kernels.linear_cross_entropy.xla",
    "reference": "recollect.pallas_kernels.linear_cross_entropy.reference",
}

WHOLE = 2**25
"""Logits (per device) up to which one array of them, as in the reference, is cheaper than a loop."""


def linear_cross_entropy(
    hidden: Float[Array, "b t d"],
    kernel: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> CrossEntropy:
    """Returns the losses of targets, and their weighted sum.

    Products take operands of hidden's dtype; logits, their log-sum-exp and the gradient of the kernel are fp32. Under a
    mesh the targets are split over data and fsdp (b), sequence and tensor (t), where those divide them; the kernel is
    gathered in hidden's dtype.

    Args:
      hidden: (b, t, d).
      kernel: (d, v), of any float dtype.
      targets: (b, t) int, below v.
      weights: (b, t).
      z_loss: weight of the squared log-sum-exp.
      chunk: targets whose logits are in memory at once, on each device; None: all where they are few, else as many as
        fit 256 MiB.
      backend: see recollect.pallas_kernels.dispatch.

    Raises:
      ValueError: an argument's shape or value does not fit; the backend cannot serve the call.
    """
    if hidden.ndim != 3:
        raise ValueError(f"linear_cross_entropy: hidden must have three dimensions; got {hidden.shape}")
    b, t, d = hidden.shape
    if kernel.ndim != 2 or kernel.shape[0] != d:
        fit = f"({d}, v) to fit hidden {hidden.shape}"
        raise ValueError(f"linear_cross_entropy: kernel must be {fit}; got {kernel.shape}")
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != (b, t):
            raise ValueError(f"linear_cross_entropy: {name} must be {(b, t)}; got {array.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"linear_cross_entropy: targets must be integers; got {targets.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, or None; got {chunk}")
    if z_loss < 0:
        raise ValueError(f"linear_cross_entropy: z_loss must not be negative; got {z_loss}")
    arrays = (hidden, kernel, targets, weights)
    few = chunk is None and targets.size * kernel.shape[1] <= WHOLE
    backends = {"reference": BACKENDS["reference"], **BACKENDS} if few else BACKENDS
    run = choose("linear_cross_entropy", backend, backends, *arrays, z_loss=z_loss, chunk=chunk)
    total, *rest = run(*arrays, z_loss=z_loss, chunk=chunk)
    return CrossEntropy(total, *map(jax.lax.stop_gradient, rest))


__all__ = ["CrossEntropy", "linear_cross_entropy"]
