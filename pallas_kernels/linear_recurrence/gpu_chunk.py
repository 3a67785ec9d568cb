"""A chunk of a GPU scan (gpu_body.py): what is read out of the state and of the chunk's pairs, and what is written.

This module serves no decay or one per head, which multiplies scores and the rows that are read and written;
gpu_channels.py serves decays by channel, which act inside the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence.gpu_plan import CHUNK, KEEP, READS, TOTAL, WRITES, ScanPlan
from recollect.pallas_kernels.mosaic_gpu import plgpu


class Chunk:
    """One chunk, as one warpgroup sees it.

    copied: its inputs in shared memory; work: shared memory for what is computed. part, meet: see
    gpu_decay.scores_by_key.
    """

    def __init__(
        self, plan: ScanPlan, copied: dict[str, Any], work: dict[str, Any], part: Any, meet: Callable[[], None]
    ) -> None:
        self.plan, self.copied, self.work, self.part, self.meet = plan, copied, work, part, meet

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """(c, columns): reads . q S + P y. early: called when the early group has been read, if there is one."""
        return self.read_pairs("q", y, self.work["scores"], self.plan.strict)

    def read_pairs(self, query: str, y: Any, scores: Any, strict: bool) -> jax.Array:
        """`read`, of these queries, with what the second pair of a plain scan adds."""
        copied, q = self.copied, self.copied[query]

        def store(products: jax.Array) -> None:
            scores[...] = self.weighted(products, strict).astype(jnp.bfloat16)

        _, from_state = gpu.mm_while((q, gpu.transposed(copied["k"])), (q, self.work["state"]), store)
        from_state = self.times(from_state, READS)
        if "second_k" in self.plan.tokens and "w" not in self.plan.tokens:  # the delta rule reads y alone
            second = self.work["second_scores"]
            second[...] = self.weighted(gpu.mm(q, gpu.transposed(copied["second_k"])), False).astype(jnp.bfloat16)
            plgpu.commit_smem()
            # Scaled after it is rounded, as the same products are where they belong to queries: their difference is the
            # gradient of a decay.
            from_state = from_state + gpu.mm(second, copied["second_v"]) * self.plan.second_scale
        else:
            plgpu.commit_smem()
        return gpu.mm(scores, y, from_state)

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """Stores what is written to the state, weighted values in their stages: pairs of factors to multiply once
        committed."""
        pairs = []
        for key, value, place in self.written(y):
            if self.plan.has_rows:
                weighted = self.times(gpu.load(value).astype(jnp.float32), WRITES)
                self.copied[place][...] = weighted.astype(jnp.bfloat16)
                value = self.copied[place]
            pairs.append((gpu.transposed(self.copied[key]), value))
        return pairs

    def written(self, y: Any) -> list[tuple[str, Any, str]]:
        """Of each pair that is written: the key's name, the value, and the name of the value's stage."""
        second = [("second_k", self.copied["second_v"], "second_v")] if "second_k" in self.plan.tokens else []
        return [("k", y, "v"), *second]

    def keep(self) -> jax.Array | None:
        """What the entering state is multiplied by; None for 1."""
        return self.copied["rows"][KEEP, 0] if self.plan.has_rows else None

    def rest(self) -> jax.Array | float:
        """What rounding leaves out of weights to the chunk's last token, for each entry of the state."""
        return 1.0

    def per_token(self, row: int) -> Any:
        """Where a scalar per token lies; None where all are 1."""
        return self.copied["rows"].at[row] if self.plan.has_rows else None

    def times(self, x: jax.Array, row: int) -> jax.Array:
        """x with its rows multiplied by a scalar per token."""
        weights = self.per_token(row)
        return x if weights is None else x * gpu.along_columns(gpu.load_per_row(weights), x.shape[1])

    def mask(self, strict: bool) -> jax.Array:
        """(c, c) bool: which pairs of the chunk count."""
        return pair_mask(self.copied.get("segments"), self.plan.reverse, strict)

    def weighted(self, products: jax.Array, strict: bool) -> jax.Array:
        """q k^T, masked, and weighted by a decay per head."""
        total = self.copied["rows"].at[TOTAL] if self.plan.decay == "head" else None
        return weight_pairs(products, self.mask(strict), total, self.plan.reverse)


def pair_mask(segments: Any, reverse: bool, strict: bool) -> jax.Array:
    """(c, c) bool: which pairs count. segments: (c,) int32 in plain shared memory, or None."""
    row, column = gpu.row_and_column((CHUNK, CHUNK))
    if reverse:
        mask = column > row if strict else column >= row
    else:
        mask = column < row if strict else column <= row
    if segments is None:
        return mask
    of_row = gpu.along_columns(gpu.load_per_row(segments), CHUNK)
    of_column = gpu.along_rows(gpu.load_per_column(segments), CHUNK)
    return mask & (of_row == of_column)


def weight_pairs(products: jax.Array, mask: jax.Array, total: Any, reverse: bool) -> jax.Array:
    """(c, c): products where mask is true, else 0, weighted by a decay per head.

    total: (c,) in plain shared memory, or None for no such decay.
    """
    if total is None:
        return jnp.where(mask, products, 0.0)
    difference = gpu.along_columns(gpu.load_per_row(total), CHUNK) - gpu.along_rows(gpu.load_per_column(total), CHUNK)
    return products * jnp.exp(jnp.where(mask, -difference if reverse else difference, -jnp.inf))
