"""What a Mosaic GPU kernel of scheduled attention is built for, and what it lays out in shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.scheduled_attention.flash_vjp import AttentionSettings

ROWS = gpu.ROWS  # of the own side, a warpgroup
LOG2_E = 1.4426950408889634
HALF_A_CORE = 228 * 1024 // 2 - 3072  # bytes of shared memory, less what the hardware takes and what is kept free
KEEP_FREE = 6144  # bytes of shared memory left for barriers and what the compiler lays out


@dataclasses.dataclass(frozen=True)
class GpuPlan:
    """What a kernel is built for.

    heads, key_heads: of queries and of keys. key_dim, value_dim: padded to 64s. fields: names of what masks read, empty
    if no tile is
    masked. visits: the first two sizes of the schedule's arrays. gathered: whether each tile of queries names its key
    head.
    """

    kernel: Literal["forward", "query_gradient", "key_gradients"]
    settings: AttentionSettings
    b: int
    n: int
    s: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    visits: tuple[int, int]
    masked: bool
    fields: tuple[str, ...]
    sinks: bool
    gathered: bool
    part_rows: int
    """Rows of the other side that are copied and computed at once: they divide its tiles."""

    @property
    def over_queries(self) -> bool:
        """Whether the other side is the queries'."""
        return self.kernel == "key_gradients"

    @property
    def resident_tile(self) -> int:
        return self.settings.key_tile if self.over_queries else self.settings.query_tile

    @property
    def streamed_tile(self) -> int:
        return self.settings.query_tile if self.over_queries else self.settings.key_tile

    @property
    def resident_fields(self) -> str:
        return "key_fields" if self.over_queries else "query_fields"

    @property
    def streamed_fields(self) -> str:
        return "query_fields" if self.over_queries else "key_fields"

    @property
    def unit(self) -> float:
        """What scores are multiplied by to be in units of log 2: above 0, as gpu.py sees to."""
        return self.settings.scale * LOG2_E

    @property
    def in_blocks(self) -> bool:
        return self.settings.block is not None

    @property
    def takes_turns(self) -> bool:
        """Whether two warpgroups make exponentials in turns, each while the other has the tensor cores
        (FlashAttention-3, Shah et al. 2024, section 3.1). Of head sizes to 64 a core holds two thread blocks, which do
        so by themselves."""
        return self.kernel == "forward" and self.warpgroups == 2 and max(self.key_dim, self.value_dim) > 64

    @property
    def warpgroups(self) -> int:
        """Of a thread block: one for each 64 of its own rows."""
        return self.resident_tile // ROWS

    @property
    def sharing(self) -> int:
        """Query heads a key head, which a walk over queries visits in turn."""
        return 1 if self.gathered else self.heads // self.key_heads

    @property
    def repeats(self) -> int:
        """How often the visited tiles are walked over."""
        return self.sharing if self.over_queries else 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Heads vary fastest: query heads of one key head, then, share it in the second-level cache."""
        own = (self.s if self.over_queries else self.n) // self.resident_tile
        return self.key_heads if self.over_queries else self.heads, own, self.b

    def stages(self) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """What is copied with each part_rows: shape, dtype, and whether it is tiled."""
        keyed, valued = (((self.part_rows, size), jnp.bfloat16, True) for size in (self.key_dim, self.value_dim))
        copied: dict[str, tuple[tuple[int, ...], Any, bool]]
        if self.over_queries:
            copied = {"q": keyed, "do": valued, "rows": ((2, self.part_rows), jnp.float32, False)}
        else:
            copied = {"k": keyed, "v": valued}
        if self.fields:
            copied[self.streamed_fields] = ((len(self.fields), self.part_rows), jnp.int32, False)
        return copied

    def resident_arrays(self) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """What is copied once, the own rows in 64s; as in `stages`."""
        names = {"forward": ("q",), "query_gradient": ("q", "do"), "key_gradients": ("k", "v")}[self.kernel]
        copied: dict[str, tuple[tuple[int, ...], Any, bool]] = {
            name: ((self.warpgroups, ROWS, self.key_dim if name in ("q", "k") else self.value_dim), jnp.bfloat16, True)
            for name in names
        }
        if self.fields:
            copied[self.resident_fields] = ((self.warpgroups, len(self.fields), ROWS), jnp.int32, False)
        return copied

    def scratch_arrays(self) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """What else is laid out in shared memory, for each 64 of the own rows; as in `stages`."""
        laid: dict[str, tuple[tuple[int, ...], Any, bool]] = {}
        if self.kernel == "forward" and self.key_dim != self.value_dim:
            laid["out"] = ((self.warpgroups, ROWS, self.value_dim), jnp.bfloat16, True)
        if (self.over_queries and self.in_blocks) or dispatch.interpretation() is not None:
            # The simulator's products take no operand from registers; and blocks' weights are turned on their way
            # through shared memory.
            laid["weights"] = ((self.warpgroups, ROWS, self.part_rows), jnp.bfloat16, True)
            if self.over_queries and not self.in_blocks:
                laid["d_scores"] = laid["weights"]
        return laid

    def stage_count(self) -> int:
        """As many as shared memory holds, at most 4. Of thread blocks of one warpgroup, two should fit a core."""
        fixed = gpu.shared_bytes(
            [(shape, dtype) for shape, dtype, _ in (*self.resident_arrays().values(), *self.scratch_arrays().values())]
        )
        stage = gpu.shared_bytes([(shape, dtype) for shape, dtype, _ in self.stages().values()])
        if self.warpgroups == 1:
            beside_another = (HALF_A_CORE - fixed) // stage
            if beside_another >= 2:
                return min(4, beside_another)
        return max(1, min(4, (gpu.SHARED_MEMORY_BYTES - KEEP_FREE - fixed) // stage))

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The kernel's outputs."""
        queries, keys = (self.b, self.n, self.heads), (self.b, self.s, self.key_heads)
        if self.kernel == "forward":
            return {
                "o": jax.ShapeDtypeStruct((*queries, self.value_dim), jnp.bfloat16),
                "lse": jax.ShapeDtypeStruct((self.b, self.heads, self.n), jnp.float32),
            }
        if self.kernel == "query_gradient":
            return {"dq": jax.ShapeDtypeStruct((*queries, self.key_dim), jnp.bfloat16)}
        return {
            "dk": jax.ShapeDtypeStruct((*keys, self.key_dim), jnp.bfloat16),
            "dv": jax.ShapeDtypeStruct((*keys, self.value_dim), jnp.bfloat16),
        }
