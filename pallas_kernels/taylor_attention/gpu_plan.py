"""What the kernels of gpu_body.py are built for, and what follows from it: sizes, shared memory, results."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recollect.pallas_kernels import mosaic_gpu as gpu
from recollect.pallas_kernels.linear_recurrence.gpu_spans import CHUNK, InSpans

COLUMNS = FEATURE_BLOCK = gpu.ROWS
SWIZZLE = 64  # bytes: feature blocks are of multiples of 32 features
KEY_COLUMNS = 16  # key dimensions, padded: 32 bytes, what rows of the narrow tiles have
# Of a token: whether it reads the state, whether it is written to it, whether its chunk keeps it (0 or 1); its
# document's number in the chunk, as a query and as a key (-1 for padding).
READ, WRITE, KEEP, DOCUMENT, KEY_DOCUMENT = range(5)
MAPS = ("query_left", "key_left", "right", "ones", "order")


@dataclasses.dataclass(frozen=True)
class TaylorPlan(InSpans):
    """What a kernel is built for: the forward pass, the scan for dq, the one in reverse for dk and dv, or the states of
    one of these.

    value_dim: padded to 64s; features: to 32s. rows: numbers per token; marked: whether there are documents or padding.
    spans: see linear_recurrence/gpu_spans.py.
    """

    scan: Literal["forward", "queries", "keys_values", "key_states", "query_states"]
    b: int
    t: int
    heads: int
    value_dim: int
    features: int
    scale: float
    rows: int
    marked: bool
    enters: bool
    leaves: bool
    spans: int = 1

    @property
    def reverse(self) -> bool:
        """Whether the scan begins at the last chunk."""
        return self.scan in ("keys_values", "query_states")

    @property
    def states_only(self) -> bool:
        """Whether it finds states and nothing else."""
        return self.scan.endswith("states")

    @property
    def maps(self) -> tuple[str, ...]:
        """Which of MAPS are read."""
        unread = {"key_states": "query_left", "query_states": "key_left"}.get(self.scan)
        return tuple(name for name in MAPS if name != unread)

    @property
    def splits(self) -> int:
        """Blocks of value columns."""
        return self.value_dim // COLUMNS

    @property
    def feature_blocks(self) -> list[Any]:
        """Where blocks of the features lie."""
        starts = range(0, self.features, FEATURE_BLOCK)
        return [pl.ds(start, min(FEATURE_BLOCK, self.features - start)) for start in starts]

    def stages(self) -> dict[str, Any]:
        """What is copied with each chunk; two of each."""
        keys = gpu.tiled((2, CHUNK, KEY_COLUMNS), jnp.bfloat16, 2 * KEY_COLUMNS)
        values = gpu.tiled((2, CHUNK, COLUMNS), jnp.bfloat16, SWIZZLE)
        copied = {"q": keys, "k": keys, "v": values, "do": values}
        read = {"forward": ("q", "k", "v"), "key_states": ("k", "v"), "query_states": ("q", "do")}.get(
            self.scan, tuple(copied)
        )
        copied = {name: copied[name] for name in read}
        if self.rows:
            copied["rows"] = gpu.plain((2, self.rows, CHUNK), jnp.float32)
        if self.marked:
            copied["marks"] = gpu.plain((2, 5, CHUNK), jnp.float32)
        return copied

    def space(self) -> dict[str, Any]:
        """What a chunk's work is laid out in, and the constant matrices."""
        square, features = (gpu.tiled((1, CHUNK, columns), jnp.bfloat16, SWIZZLE) for columns in (CHUNK, self.features))
        narrow = gpu.tiled((1, CHUNK, CHUNK), jnp.bfloat16, 2 * KEY_COLUMNS)
        maps = gpu.tiled((1, self.features, KEY_COLUMNS), jnp.bfloat16, 2 * KEY_COLUMNS)
        laid = {name: maps for name in self.maps if name not in ("ones", "order")}
        laid |= {"ones": gpu.plain((2, self.features), jnp.float32), "order": gpu.plain((1, CHUNK), jnp.int32)}
        if self.states_only:
            return laid | {self.written[0]: features}
        laid |= {"state": features, "keys": features}
        if self.scan != "queries":
            laid |= {"queries": features, "scores": square, "out": square}
        if self.scan != "forward":
            laid |= {"d_scores": narrow, "by_left": narrow, "by_right": narrow}
        return laid

    @property
    def written(self) -> tuple[str, str]:
        """Whose features are written to the state, with which values."""
        return ("queries", "do") if self.reverse else ("keys", "v")

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The kernel's outputs. states_only: (b, spans - 1, h, v, features) alone."""
        b, t, h = self.b, self.t, self.heads
        if self.states_only:
            return {"state": jax.ShapeDtypeStruct((b, self.spans - 1, h, self.value_dim, self.features), jnp.float32)}
        by_value = jax.ShapeDtypeStruct((b, t, h, self.value_dim), jnp.bfloat16)
        by_key = jax.ShapeDtypeStruct((self.splits, b, t, h, KEY_COLUMNS), jnp.float32)
        made = {"forward": {"o": by_value}, "queries": {"dq": by_key}, "keys_values": {"dk": by_key, "dv": by_value}}[
            self.scan
        ]
        if self.scan == "forward" and self.rows:
            made["sums"] = jax.ShapeDtypeStruct((self.splits, b, h, t), jnp.float32)
        if self.leaves:
            made["state"] = jax.ShapeDtypeStruct((b, h, self.value_dim, self.features), jnp.float32)
        return made
