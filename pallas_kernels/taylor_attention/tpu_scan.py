"""How the TPU kernels' arrays are cut into blocks, and the call of a scan over the chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import mosaic_tpu
from recollect.pallas_kernels.taylor_attention.features import count, selections

CHUNK = 128


def chunk_of(t: int, chunk_size: int | None) -> int:
    """Returns the tokens per chunk of t: rows of one number per token lie along lanes, so that blocks are of 128 tokens
    or of all."""
    return min(-(-(chunk_size or CHUNK) // 128) * 128, -(-t // 16) * 16)


@dataclasses.dataclass(frozen=True)
class TaylorShape:
    """Sizes of a call: b rows of t tokens and h heads, `group` of them per program; `features` as padded."""

    b: int
    t: int
    h: int
    key_dim: int
    value_dim: int
    chunk: int
    group: int
    features: int

    @staticmethod
    def of(b: int, t: int, h: int, key_dim: int, value_dim: int, chunk: int) -> TaylorShape:
        fitting = [g for g in range(1, h) if h % g == 0 and g * key_dim % 128 == 0 and g * value_dim % 128 == 0]
        features = -(-count(key_dim) // 16) * 16
        return TaylorShape(b, t, h, key_dim, value_dim, chunk, min(fitting, default=h), features)

    @property
    def groups(self) -> int:
        return self.h // self.group

    @property
    def vmem_bytes(self) -> int:
        """About what the larger scan holds: blocks twice (they are fetched ahead), states three times, and one
        head's chunk in work."""

        def lanes(size: int) -> int:
            return -(-size // 128) * 128

        value_lanes, chunk = lanes(self.group * self.value_dim), self.chunk
        blocks = 2 * 4 * chunk * (4 * value_lanes + 3 * lanes(self.group * self.key_dim))
        states = 3 * 4 * self.group * self.features * (lanes(self.value_dim) + 8)
        return blocks + states + 4 * chunk * (6 * lanes(self.features) + 5 * lanes(chunk))

    @property
    def state_sizes(self) -> list[tuple[int, int]]:
        """Of a head's state: its value columns, and its normaliser as a row."""
        return [(self.features, self.value_dim), (1, self.features)]


@dataclasses.dataclass(frozen=True)
class TaylorBlocks:
    """Arrays, by name, with the block that the program (row, group of heads, step) works on."""

    shape: TaylorShape
    normalise: bool
    reverse: bool

    def tokens(self, name: str, x: Any) -> tuple[str, Any, pl.BlockSpec]:
        """Rows (b, t, h, d), an array or its shape."""
        b, t, h, d = x.shape
        spec = pl.BlockSpec((1, self.shape.chunk, self.shape.group * d), lambda b, g, n: (b, self._at(n), g))
        return name, _reshaped(x, (b, t, h * d)), spec

    def row(self, name: str, x: Any) -> tuple[str, Any, pl.BlockSpec]:
        """One number per token, (b, h, t)."""
        shape = self.shape
        spec = pl.BlockSpec((1, 1, shape.group, shape.chunk), lambda b, g, n: (b, g, 0, self._at(n)))
        return name, _reshaped(x, (shape.b, shape.groups, shape.group, shape.t)), spec

    def marks(self, marks: jax.Array) -> mosaic_tpu.Input:
        """Marks (b, 8, t)."""
        return "marks", marks, pl.BlockSpec((1, 8, self.shape.chunk), lambda b, g, n: (b, 0, self._at(n)))

    def states(self, name: str) -> list[mosaic_tpu.Output]:
        """New states: `name`, and `name`_normaliser where there is one."""
        shape, outputs = self.shape, []
        for suffix, size in zip(("", "_normaliser")[: 1 + self.normalise], shape.state_sizes, strict=False):
            spec = pl.BlockSpec((1, shape.group, *size), lambda b, g, n: (b, g, 0, 0))
            outputs.append((name + suffix, jax.ShapeDtypeStruct((shape.b, shape.h, *size), jnp.float32), spec))
        return outputs

    def entering(self, name: str, state: jax.Array) -> list[mosaic_tpu.Input]:
        """A state (b, h, features, v + 1 or v) as inputs, named as `states` names them."""
        state = jnp.pad(state, ((0, 0), (0, 0), (0, self.shape.features - state.shape[2]), (0, 0)))
        parts = [state[..., :-1], state[..., -1][:, :, None]] if self.normalise else [state]
        return [(name, x, spec) for x, (name, _, spec) in zip(parts, self.states(name), strict=True)]

    def maps(self, dtype: Any) -> list[mosaic_tpu.Input]:
        """The constants of the feature map: left, right, and rows of weights and ones."""
        constants = selections(self.shape.key_dim, self.shape.features)
        rows = np.zeros((8, self.shape.features), np.float32)
        rows[:3] = constants.weight, constants.left_one, constants.right_one
        arrays = {"left": jnp.asarray(constants.left, dtype), "right": jnp.asarray(constants.right, dtype)}
        arrays["rows"] = jnp.asarray(rows)
        return [(name, x, pl.BlockSpec(x.shape, lambda b, g, n: (0, 0))) for name, x in arrays.items()]

    def _at(self, step: Any) -> Any:
        return self.shape.t // self.shape.chunk - 1 - step if self.reverse else step


def scan(
    kernel: Callable[..., None], blocks: TaylorBlocks, inputs: list[Any], outputs: list[Any], name: str
) -> dict[str, jax.Array]:
    """Runs kernel(references by name, state, normaliser if there is one) over all chunks; returns its outputs by
    name."""
    shape = blocks.shape
    scored = shape.chunk * (shape.key_dim + shape.value_dim)
    through_state = shape.features * (2 * shape.value_dim + 4 * shape.key_dim)
    return mosaic_tpu.call(
        kernel,
        inputs,
        outputs,
        grid=(shape.b, shape.groups, shape.t // shape.chunk),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        flops=2 * shape.b * shape.h * shape.t * (scored + through_state) * max(1, len(outputs) - 1),
        scratch=[pltpu.VMEM((shape.group, *size), jnp.float32) for size in shape.state_sizes[: 1 + blocks.normalise]],
        name=name,
    )


def join_state(results: Mapping[str, jax.Array], name: str, features: int) -> jax.Array:
    """Returns a state as the operation has it, (b, h, features, v + 1), of the outputs that `TaylorBlocks.states`
    names."""
    state, normaliser = results[name], results.get(name + "_normaliser")
    if normaliser is not None:
        state = jnp.concatenate([state, jnp.swapaxes(normaliser, 2, 3)], axis=3)
    return state[:, :, :features]


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)
