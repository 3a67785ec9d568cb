"""Chunks of GPU scans whose decay has channels: of the keys, the state's rows, or of the values, its columns.

See gpu_decay.py for the levels. By key channel, queries and keys are weighted in their stages, level by level. By value
channel, the scores are stored once for each level, and the values are weighted in `scaled_v`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_decay
from recollect.pallas_kernels.linear_recurrence.gpu_chunk import Chunk
from recollect.pallas_kernels.linear_recurrence.gpu_plan import READS, SCORES_BY_LEVEL, WRITES
from recollect.pallas_kernels.mosaic_gpu import plgpu


class _ChunkByChannel(Chunk):
    def keep(self) -> jax.Array:
        """See Chunk.keep."""
        kept = super().keep()
        decay = gpu_decay.keep(self.copied["marks"], self.work["references"], *self._state(), self.plan.writes_rest)
        return decay if kept is None else decay * kept

    def rest(self) -> jax.Array:
        """See Chunk.rest."""
        return gpu_decay.rest(self.copied["marks"], self.work["references"], *self._state())

    def _state(self) -> tuple[tuple[int, int], bool]:
        """The state's shape, and whether its rows are the decay's channels; else its columns are."""
        return (self.plan.key_dim, self.plan.columns), self.plan.decay == "key"


class ChunkByKey(_ChunkByChannel):
    """A chunk under a decay by key channel."""

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """See Chunk.read."""
        plan, work, scores, part = self.plan, self.work, self.work["scores"], self.part
        q, k, ratios, reads = self.copied["q"], self.copied["k"], work["ratios"], self.per_token(READS)
        decay = (self.copied["total"], work["references"], ratios, plan.reverse)
        gpu_decay.scores_by_key(scores, q, k, q, k, *decay, early, part, self.meet)
        scores[...] = jnp.where(self.mask(plan.strict), gpu.load(scores), jnp.bfloat16(0))
        self.meet()
        gpu_decay.step(q, ratios, gpu_decay.BORDER, not plan.reverse, reads, part)
        plgpu.commit_smem()
        self.meet()
        return gpu.mm(q, work["state"], None, (scores, y))

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """See Chunk.writes; here keys are weighted."""
        plan, references, weights = self.plan, self.work["references"], self.per_token(WRITES)
        pairs = []
        for name, value, _ in self.written(y):
            key = self.copied[name]
            if plan.stepped and name == "k":
                gpu_decay.step(key, self.work["ratios"], gpu_decay.BORDER, plan.reverse, weights, self.part)
            else:
                decay = (self.copied["total"], self.copied["marks"], references)
                gpu_decay.scale_to_border(key, *decay, plan.reverse, plan.stepped, weights, self.part)
            pairs.append((gpu.transposed(key), value))
        return pairs


class ChunkByValue(_ChunkByChannel):
    """A chunk under a decay by value channel."""

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """See Chunk.read."""
        plan, copied, work = self.plan, self.copied, self.work
        levels = [work[name] for name in SCORES_BY_LEVEL]

        def store(products: jax.Array) -> None:
            gpu_decay.store_by_level(levels, self.weighted(products, plan.strict))

        if plan.key_dim > 128:  # no registers for both products at once
            store(gpu.mm(copied["q"], gpu.transposed(copied["k"])))
            from_state = gpu.mm(copied["q"], work["state"])
        else:
            _, from_state = gpu.mm_while(
                (copied["q"], gpu.transposed(copied["k"])), (copied["q"], work["state"]), store
            )
        decay = (copied["total"], copied["marks"], work["references"], work["ratios"])
        return gpu_decay.read_by_value(
            lambda factors: self.times(from_state * factors, READS),
            levels,
            work["scaled_v"],
            y,
            *decay,
            plan.reverse,
            early,
        )

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """See Chunk.writes; what was read with the last level's weights is stepped on."""
        plan, copied, work, weights = self.plan, self.copied, self.work, self.per_token(WRITES)
        if plan.stepped:
            value = work["scaled_v"]
            gpu_decay.step(value, work["ratios"], gpu_decay.BORDER, plan.reverse, weights)
        else:
            value, decay = y, (copied["total"], copied["marks"], work["references"])
            gpu_decay.scale_to_border(value, *decay, plan.reverse, False, weights)
        return [(gpu.transposed(copied["k"]), value)]
