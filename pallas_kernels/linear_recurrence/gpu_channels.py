"""Chunks of GPU walks whose decay has channels: of the keys, the state's rows, or of the values, its columns.

See gpu_decay.py for the levels. By key channel, queries and keys are weighted in their stages, level by level. By value
channel, the scores are laid out once for each level, and the values are weighted in `scaled_v`.
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
        decay = gpu_decay.keep(self.here["marks"], self.space["references"], *self._state(), self.plan.writes_rest)
        return decay if kept is None else decay * kept

    def rest(self) -> jax.Array:
        """See Chunk.rest."""
        return gpu_decay.rest(self.here["marks"], self.space["references"], *self._state())

    def _state(self) -> tuple[tuple[int, int], bool]:
        """The state's shape, and whether its rows are the decay's channels; else its columns are."""
        return (self.plan.key_dim, self.plan.columns), self.plan.decay == "key"


class ChunkByKey(_ChunkByChannel):
    """A chunk under a decay by key channel."""

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """See Chunk.read."""
        plan, space, scores, part = self.plan, self.space, self.space["scores"], self.part
        q, k, ratios, reads = self.here["q"], self.here["k"], space["ratios"], self.per_token(READS)
        given = (self.here["total"], space["references"], ratios, plan.reverse)
        gpu_decay.scores_by_key(scores, q, k, q, k, *given, early, part, self.meet)
        scores[...] = jnp.where(self.seen(plan.strict), gpu.load(scores), jnp.bfloat16(0))
        self.meet()
        gpu_decay.step(q, ratios, gpu_decay.BORDER, not plan.reverse, reads, part)
        plgpu.commit_smem()
        self.meet()
        return gpu.mm(q, space["state"], None, (scores, y))

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """See Chunk.writes; here keys are weighted."""
        plan, references, weights = self.plan, self.space["references"], self.per_token(WRITES)
        pairs = []
        for name, value, _ in self.written(y):
            key = self.here[name]
            if plan.stepped and name == "k":
                gpu_decay.step(key, self.space["ratios"], gpu_decay.BORDER, plan.reverse, weights, self.part)
            else:
                given = (self.here["total"], self.here["marks"], references)
                gpu_decay.scale_to_border(key, *given, plan.reverse, plan.stepped, weights, self.part)
            pairs.append((gpu.transposed(key), value))
        return pairs


class ChunkByValue(_ChunkByChannel):
    """A chunk under a decay by value channel."""

    def read(self, y: Any, early: Callable[[], None]) -> jax.Array:
        """See Chunk.read."""
        plan, here, space = self.plan, self.here, self.space
        levels = [space[name] for name in SCORES_BY_LEVEL]

        def lay(products: jax.Array) -> None:
            gpu_decay.lay_by_level(levels, self.weigh(products, plan.strict))

        if plan.key_dim > 128:  # no registers for both products at once
            lay(gpu.mm(here["q"], gpu.transposed(here["k"])))
            old = gpu.mm(here["q"], space["state"])
        else:
            _, old = gpu.mm_while((here["q"], gpu.transposed(here["k"])), (here["q"], space["state"]), lay)
        given = (here["total"], here["marks"], space["references"], space["ratios"])
        return gpu_decay.read_by_value(
            lambda factors: self.times(old * factors, READS), levels, space["scaled_v"], y, *given, plan.reverse, early
        )

    def writes(self, y: Any) -> list[tuple[Any, Any]]:
        """See Chunk.writes; what was read as the last level has it is stepped on."""
        plan, here, space, weights = self.plan, self.here, self.space, self.per_token(WRITES)
        if plan.stepped:
            value = space["scaled_v"]
            gpu_decay.step(value, space["ratios"], gpu_decay.BORDER, plan.reverse, weights)
        else:
            value, given = y, (here["total"], here["marks"], space["references"])
            gpu_decay.scale_to_border(value, *given, plan.reverse, False, weights)
        return [(gpu.transposed(here["k"]), value)]
