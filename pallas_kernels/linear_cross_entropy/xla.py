"""All logits at once where they are few, else one chunk of targets after another."""

from __future__ import annotations

import jax

from recollect.pallas_kernels.linear_cross_entropy import WHOLE, reference


def linear_cross_entropy(
    hidden, kernel, targets, weights, *, z_loss, chunk
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns total, loss, lse and correct; arguments as those of the public function."""
    if chunk is None and targets.size * kernel.shape[1] <= WHOLE:
        return reference.linear_cross_entropy(hidden, kernel, targets, weights, z_loss=z_loss)
    from recollect.pallas_kernels.linear_cross_entropy.chunks import chunked

    return chunked(hidden, kernel, targets, weights, float(z_loss), chunk)
