"""What the kernel of gpu_body.py is built for, and what follows from it: sizes, shared memory, stages, results.

A block holds as many columns of the state as fit registers. What is copied has one stage or two; what one stage lets be
read early is copied again early, in a group of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence import gpu_decay
from recollect.pallas_kernels.linear_recurrence.chunk_scan import Decay

CHUNK = gpu.ROWS
KEYED = ("q", "k", "w", "second_k", "second_q")  # arrays with the key size; others have the value size
SCORES_BY_LEVEL = ("scores_in_blocks", "scores_in_halves", "scores")
TOTAL, READS, WRITES, KEEP = range(4)  # rows of gpu.weight_rows


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """What a kernel is built for. key_dim, value_dim: padded. tokens: names of the arrays (b, t, h, k | v) it reads.

    spans: of time, of `span` chunks each in the order of the walk, the last maybe of fewer. states_only: see
    gpu_body.py.
    """

    b: int
    t: int
    heads: int
    key_dim: int
    value_dim: int
    decay: Decay
    reverse: bool
    strict: bool
    scale: float
    tokens: tuple[str, ...]
    segmented: bool
    enters: bool
    keeps_y: bool
    checkpoint_every: int | None
    out_dtype: jnp.dtype
    second_scale: float = 1.0
    spans: int = 1
    states_only: bool = False

    @property
    def n(self) -> int:
        """Chunks."""
        return self.t // CHUNK

    @property
    def span(self) -> int:
        """Chunks of a span."""
        return -(-self.n // self.spans)

    @property
    def transition(self) -> bool:
        """Whether blocks are added that find T."""
        return self.states_only and "w" in self.tokens

    @property
    def splits(self) -> int:
        """Blocks of columns."""
        return (self.value_dim + (self.key_dim if self.transition else 0)) // self.columns

    @property
    def columns(self) -> int:
        """Columns of the state that a block walks with: what registers hold."""
        return 32 if self.decay == "value" or self.key_dim > 128 else 64

    @property
    def warpgroups(self) -> int:
        """2 where two blocks of the state's columns share what is made of queries and keys, most of the work beside a
        decay by key channel; each then makes half of the channels, 64, a tile's width."""
        shares = (
            self.decay == "key"
            and not self.states_only
            and "dot_with" not in self.tokens
            and self.out_dtype == jnp.bfloat16
        )
        return 2 if shares and self.key_dim == 128 and self.value_dim % (2 * self.columns) == 0 else 1

    @property
    def swizzle(self) -> int:
        """Bytes of a tile's row, of every operand."""
        return 2 * self.columns

    @property
    def by_channel(self) -> bool:
        """Whether the decay has channels."""
        return self.decay in ("key", "value")

    @property
    def has_rows(self) -> bool:
        """Whether tokens have scalar weights (gpu.weight_rows)."""
        return self.decay == "head" or self.segmented

    @property
    def outputs(self) -> dict[str, str]:
        """What is read out: name, and where it is laid out before it is stored."""
        places = {"o": "scores"} if "q" in self.tokens else {}
        places |= {"second_o": "second_scores"} if "second_q" in self.tokens else {}
        return (
            places
            if self.out_dtype == jnp.bfloat16 and self.columns == CHUNK
            else {name: f"{name}_out" for name in places}
        )

    @property
    def stepped(self) -> bool:
        """Whether operands that products of pairs have read are stepped on to the borders, whose last one is rounded
        (gpu_decay.rest)."""
        return self.by_channel and "q" in self.tokens

    @property
    def reads_rest(self) -> bool:
        """Whether queries read the state through the rest, their weights being to the chunk's last token."""
        return self.stepped and self.reverse and self.decay == "key"

    @property
    def writes_rest(self) -> bool:
        """Whether the state takes the rest once it is written, the weights of what is written being to the chunk's
        last token."""
        return self.stepped and not self.reverse

    @property
    def decayed_columns(self) -> int:
        """Channels of the decay that a block copies."""
        return self.key_dim if self.decay == "key" else self.columns

    def stages(self) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """What is copied with each chunk: shape, dtype, and whether it is tiled."""
        copied: dict[str, tuple[tuple[int, ...], Any, bool]] = {}
        for name in self.tokens:
            copied[name] = ((CHUNK, self.key_dim if name in KEYED else self.columns), jnp.bfloat16, True)
        if self.has_rows:
            copied["rows"] = ((4, CHUNK), jnp.float32, False)
        if self.segmented:
            copied["segments"] = ((CHUNK,), jnp.int32, False)
        if self.by_channel:
            copied["total"] = ((CHUNK, self.decayed_columns), jnp.float32, True)
            copied["marks"] = ((gpu_decay.MARKS, self.decayed_columns), jnp.float32, False)
        return copied

    def plain_space(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Of what a chunk's work is laid out in, what is not tiled."""
        if not self.by_channel:
            return {}
        columns = self.decayed_columns
        return {
            "references": (gpu_decay.reference_shape(columns), jnp.float32),
            "ratios": ((gpu_decay.MARKS, columns), jnp.bfloat16),
        }

    def space(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What a chunk's work is laid out in, tiled."""
        laid: dict[str, tuple[tuple[int, ...], Any]] = {}
        if "q" in self.tokens or "w" in self.tokens:
            laid["state"] = ((self.key_dim, self.columns), jnp.bfloat16)
        if "q" in self.tokens:
            laid["scores"] = ((CHUNK, CHUNK), jnp.bfloat16)
            if "second_q" in self.tokens or "second_k" in self.tokens:
                laid["second_scores"] = ((CHUNK, CHUNK), jnp.bfloat16)
            laid |= {
                place: ((CHUNK, self.columns), self.out_dtype) for place in self.outputs.values() if place not in laid
            }
        if "w" in self.tokens:
            laid["y"] = ((CHUNK, self.columns), jnp.bfloat16)
        if self.decay == "value" and "q" in self.tokens:
            laid["scaled_v"] = ((CHUNK, self.columns), jnp.bfloat16)
            laid |= dict.fromkeys(SCORES_BY_LEVEL, ((CHUNK, CHUNK), jnp.bfloat16))
        return laid

    def buffer(self, shape: tuple[int, ...], dtype: Any, tile: bool = True) -> Any:
        """Shared memory of this kernel."""
        if not tile:
            return gpu.plain(shape, dtype)
        return gpu.tiled(shape, dtype, self.swizzle if jnp.dtype(dtype).itemsize == 2 else gpu.SWIZZLE_BYTES)

    def stage_count(self) -> int:
        """2 where shared memory holds them, else 1: then copies and computing alternate, but for what is copied early.

        Also 1 beside a decay by channel where a core then holds a second block, which computes while the first one
        waits.
        """
        if self.decay == "value" and self.key_dim > 192:
            return 1  # the addresses of two cost registers that this one lacks: 4 to 8 bytes were spilled
        if (
            self.warpgroups == 1
            and self.by_channel
            and self.bytes_taken(1) <= gpu.SHARED_MEMORY_BYTES // 2 - 2048 < self.bytes_taken(2)
        ):
            return 1
        if len(self.tokens) > 4 and 2 * self.bytes_taken(1) <= gpu.SHARED_MEMORY_BYTES - 4096 < 2 * self.bytes_taken(2):
            return 1  # two blocks a core, which hide each other's copies
        return 2 if self.bytes_taken(2) <= gpu.SHARED_MEMORY_BYTES - 2048 else 1

    def bytes_taken(self, stages: int) -> int:
        """Shared memory with so many stages."""
        laid = [((*self.own(name), *shape), dtype) for name, (shape, dtype) in self.space().items()]
        staged = [
            ((1 if self.early(name, stages) else stages, *self.own(name), *shape), dtype)
            for name, (shape, dtype, _) in self.stages().items()
        ]
        return gpu.shared_bytes([*laid, *self.plain_space().values(), *staged])

    def early(self, name: str, stages: int) -> bool:
        """Whether an array has one stage, others having `stages`, and is copied to it again as soon as it is read."""
        early = {"key": ("total",), "value": ("total", "v")}.get(self.decay, ())
        return (
            name in early and self.stepped and "second_k" not in self.tokens and (stages == 1 or self.warpgroups == 2)
        )

    def groups(self) -> list[tuple[tuple[str, ...], int]]:
        """What is copied with each chunk and to how many stages, in groups that are waited for apart: at its end, and
        early, as soon as the one stage is read."""
        stages = self.stage_count()
        early = tuple(name for name in self.stages() if self.early(name, stages))
        late = tuple(name for name in self.stages() if name not in early)
        return [(late, stages)] + ([(early, 1)] if early else [])

    def own(self, name: str) -> tuple[int, ...]:
        """The axis of warpgroups of what each has a place of its own for."""
        return (self.warpgroups,) if self.warpgroups > 1 and name in ("v", "second_v", "state", "scores", "y") else ()

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The kernel's outputs. dots: a part for each block of columns. states_only: (b, spans - 1, h, k, v + k of
        T) alone."""
        b, t, h, keys, values = self.b, self.t, self.heads, self.key_dim, self.value_dim
        if self.states_only:
            return {
                "state": jax.ShapeDtypeStruct((b, self.spans - 1, h, keys, self.splits * self.columns), jnp.float32)
            }
        made = {"state": jax.ShapeDtypeStruct((b, h, keys, values), jnp.float32)}
        made |= {name: jax.ShapeDtypeStruct((b, t, h, values), self.out_dtype) for name in self.outputs}
        if self.keeps_y:
            made["y"] = jax.ShapeDtypeStruct((b, t, h, values), jnp.bfloat16)
        dots = {"dots": "dot_with", "second_dots": "second_dot_with"}
        for name, other in dots.items():
            if other in self.tokens:
                made[name] = jax.ShapeDtypeStruct((values // self.columns, b, h, t), jnp.float32)
        if self.checkpoint_every is not None:
            made["checkpoints"] = jax.ShapeDtypeStruct(
                (b, h, -(-self.n // self.checkpoint_every), keys, values), jnp.float32
            )
        return made
