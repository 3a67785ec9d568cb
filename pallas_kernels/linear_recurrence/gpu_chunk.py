"""A chunk of a GPU walk (gpu_body.py): what is read out of the state and of the chunk's pairs, and what is written.

Here with no decay or one per head, which multiplies scores, and rows of what is read and written; gpu_channels.py has
decays by channel, which act inside the products.
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

    here: what was copied with it; space: what its work is laid out in. part, meet: see gpu_decay.scores_by_key.
    """

    def __init__(
        self, plan: ScanPlan, here: dict[str, Any], space: dict[str, Any], part: Any, meet: Callable[[], None]
    ) -> None:
        self.plan, self.here, self.space, self.part, self.meet = plan, here, space, part, meet

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """(c, columns): reads . q S + P y. early: called when the early group has been read, if there is one."""
        return self.read_pairs("q", y, self.space["scores"], self.plan.strict)

    def read_pairs(self, query: str, y: Any, scores: Any, strict: bool) -> jax.Array:
        """`read`, of these queries, with what the second pair of a plain walk adds."""
        here, q = self.here, self.here[query]

        def lay(products: jax.Array) -> None:
            scores[...] = self.weigh(products, strict).astype(jnp.bfloat16)

        _, old = gpu.mm_while((q, gpu.transposed(here["k"])), (q, self.space["state"]), lay)
        old = self.times(old, READS)
        if "second_k" in self.plan.tokens and "w" not in self.plan.tokens:  # the delta rule reads y alone
            second = self.space["second_scores"]
            second[...] = self.weigh(gpu.mm(q, gpu.transposed(here["second_k"])), False).astype(jnp.bfloat16)
            plgpu.commit_smem()
            # Scaled after it is rounded, as the same products are where they belong to queries: their difference is the
            # gradient of a decay.
            old = old + gpu.mm(second, here["second_v"]) * self.plan.second_scale
        else:
            plgpu.commit_smem()
        return gpu.mm(scores, y, old)

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """Lays out what is written to the state, weighted values in their stages: pairs of factors to multiply once
        committed."""
        pairs = []
        for key, value, place in self.written(y):
            if self.plan.has_rows:
                weighted = self.times(gpu.load(value).astype(jnp.float32), WRITES)
                self.here[place][...] = weighted.astype(jnp.bfloat16)
                value = self.here[place]
            pairs.append((gpu.transposed(self.here[key]), value))
        return pairs

    def written(self, y: Any) -> list[tuple[str, Any, str]]:
        """Of each pair that is written: the key's name, the value, and the name of the value's stage."""
        second = [("second_k", self.here["second_v"], "second_v")] if "second_k" in self.plan.tokens else []
        return [("k", y, "v"), *second]

    def keep(self) -> jax.Array | None:
        """What the entering state is multiplied by; None for 1."""
        return self.here["rows"][KEEP, 0] if self.plan.has_rows else None

    def rest(self) -> jax.Array | float:
        """What rounding leaves out of weights to the chunk's last token, for each entry of the state."""
        return 1.0

    def per_token(self, row: int) -> Any:
        """Where a scalar per token lies; None where all are 1."""
        return self.here["rows"].at[row] if self.plan.has_rows else None

    def times(self, x: jax.Array, row: int) -> jax.Array:
        """x with its rows multiplied by a scalar per token."""
        weights = self.per_token(row)
        return x if weights is None else x * gpu.along_columns(gpu.load_per_row(weights), x.shape[1])

    def seen(self, strict: bool) -> jax.Array:
        """(c, c) bool: which pairs of the chunk count."""
        return seen(self.here.get("segments"), self.plan.reverse, strict)

    def weigh(self, products: jax.Array, strict: bool) -> jax.Array:
        """q k^T, masked, and weighted by a decay per head."""
        total = self.here["rows"].at[TOTAL] if self.plan.decay == "head" else None
        return weighted(products, self.seen(strict), total, self.plan.reverse)


def seen(segments: Any, reverse: bool, strict: bool) -> jax.Array:
    """(c, c) bool: which pairs count. segments: (c,) int32 in plain shared memory, or None."""
    row, column = gpu.row_and_column((CHUNK, CHUNK))
    if reverse:
        found = column > row if strict else column >= row
    else:
        found = column < row if strict else column <= row
    if segments is None:
        return found
    mine = gpu.along_columns(gpu.load_per_row(segments), CHUNK)
    theirs = gpu.along_rows(gpu.load_per_column(segments), CHUNK)
    return found & (mine == theirs)


def weighted(products: jax.Array, seen: jax.Array, total: Any, reverse: bool) -> jax.Array:
    """(c, c): products where a pair is seen, else 0, weighted by a decay per head.

    total: (c,) in plain shared memory, or None for no such decay.
    """
    if total is None:
        return jnp.where(seen, products, 0.0)
    difference = gpu.along_columns(gpu.load_per_row(total), CHUNK) - gpu.along_rows(gpu.load_per_column(total), CHUNK)
    return products * jnp.exp(jnp.where(seen, -difference if reverse else difference, -jnp.inf))
