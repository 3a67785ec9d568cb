"""How the TPU kernels' arrays are cut into blocks and a walk over the chunks is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch
from recollect.pallas_kernels.taylor_attention.features import count, selections
from recollect.pallas_kernels.taylor_attention.kernels import TaylorSettings

CHUNK = 128


def chunk_of(t: int, chunk_size: int | None) -> int:
    """Tokens a chunk for t of them: rows of numbers a token lie along lanes, so that blocks are of 128 tokens or of
    all."""
    return min(-(-(chunk_size or CHUNK) // 128) * 128, -(-t // 16) * 16)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call: b rows of t tokens and h heads, `group` of them a program; `features` as padded."""

    b: int
    t: int
    h: int
    key_dim: int
    value_dim: int
    chunk: int
    group: int
    features: int

    @staticmethod
    def of(b: int, t: int, h: int, key_dim: int, value_dim: int, chunk: int) -> Shape:
        fitting = [g for g in range(1, h) if h % g == 0 and g * key_dim % 128 == 0 and g * value_dim % 128 == 0]
        features = -(-count(key_dim) // 16) * 16
        return Shape(b, t, h, key_dim, value_dim, chunk, min(fitting, default=h), features)

    @property
    def groups(self) -> int:
        return self.h // self.group

    @property
    def vmem_bytes(self) -> int:
        """About what the larger walk holds: blocks twice (they are fetched ahead), states three times, and one
        head's chunk in work."""

        def lanes(size: int) -> int:
            return -(-size // 128) * 128

        wide, chunk = lanes(self.group * self.value_dim), self.chunk
        blocks = 2 * 4 * chunk * (4 * wide + 3 * lanes(self.group * self.key_dim))
        states = 3 * 4 * self.group * self.features * (lanes(self.value_dim) + 8)
        return blocks + states + 4 * chunk * (6 * lanes(self.features) + 5 * lanes(chunk))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which block of each kind of array the program (row, group of heads, step) works on."""

    shape: Shape
    reverse: bool

    def at(self, step: Any) -> Any:
        return self.shape.t // self.shape.chunk - 1 - step if self.reverse else step

    def tokens(self, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.shape.chunk, self.shape.group * size), lambda b, g, n: (b, self.at(n), g))

    def row(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.shape.group, self.shape.chunk), lambda b, g, n: (b, g, 0, self.at(n)))

    def marks(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 8, self.shape.chunk), lambda b, g, n: (b, 0, self.at(n)))

    def states(self, normalise: bool) -> list[pl.BlockSpec]:
        sizes = [(self.shape.features, self.shape.value_dim), (1, self.shape.features)][: 1 + normalise]
        return [pl.BlockSpec((1, self.shape.group, *size), lambda b, g, n: (b, g, 0, 0)) for size in sizes]

    def constant(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, g, n: (0,) * len(shape))


def walk(
    kernel, shape: Shape, settings: TaylorSettings, dtype, reverse, q, k, v, marks, states, cotangents, outputs, name
):
    """One walk. outputs: "tokens" sizes with dtypes, then "row" or "states", as (kind, size, dtype)."""
    blocks = Blocks(shape, reverse)
    flat = {
        size: lambda x, size=size: x.reshape(shape.b, shape.t, shape.h * size)
        for size in (shape.key_dim, shape.value_dim)
    }
    key, value = shape.key_dim, shape.value_dim
    maps = _maps(key, shape.features, dtype)
    arrays = [flat[key](q), flat[key](k), flat[value](v), *maps]
    specs = [blocks.tokens(key), blocks.tokens(key), blocks.tokens(value), *(blocks.constant(x.shape) for x in maps)]
    if marks is not None:
        arrays, specs = [*arrays, marks], [*specs, blocks.marks()]
    if states is not None:
        arrays, specs = (
            [*arrays, *apart(states, shape.features, settings.normalise)],
            [*specs, *blocks.states(settings.normalise)],
        )
    if cotangents is not None:
        do, *rows = cotangents
        rows = [x.reshape(shape.b, shape.groups, shape.group, shape.t) for x in rows if x is not None]
        arrays, specs = [*arrays, flat[value](do), *rows], [*specs, blocks.tokens(value), *(blocks.row() for _ in rows)]
    out_shapes: list[jax.ShapeDtypeStruct] = []
    out_specs: list[pl.BlockSpec] = []
    state_sizes = [(shape.features, value), (1, shape.features)][: 1 + settings.normalise]
    for kind, size in outputs:
        if kind == "tokens":
            out_shapes.append(jax.ShapeDtypeStruct((shape.b, shape.t, shape.h * size), dtype))
            out_specs.append(blocks.tokens(size))
        elif kind == "row":
            out_shapes.append(jax.ShapeDtypeStruct((shape.b, shape.groups, shape.group, shape.t), jnp.float32))
            out_specs.append(blocks.row())
        else:
            out_shapes += [jax.ShapeDtypeStruct((shape.b, shape.h, *sizes), jnp.float32) for sizes in state_sizes]
            out_specs += blocks.states(settings.normalise)
    how = dispatch.interpretation()
    interpret: Any = False if how is None else True if how == "values" else pltpu.InterpretParams(detect_races=True)
    return pl.pallas_call(
        kernel,
        grid=(shape.b, shape.groups, shape.t // shape.chunk),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        scratch_shapes=[pltpu.VMEM((shape.group, *sizes), jnp.float32) for sizes in state_sizes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(shape, dtype, arrays, out_shapes),
        interpret=interpret,
        name=name,
    )(*arrays)


def _maps(key_dim: int, features: int, dtype) -> list[jax.Array]:
    constants = selections(key_dim, features)
    rows = np.zeros((8, features), np.float32)
    rows[:3] = constants.weight, constants.left_one, constants.right_one
    return [jnp.asarray(constants.left, dtype), jnp.asarray(constants.right, dtype), jnp.asarray(rows)]


def apart(state: jax.Array, features: int, normalise: bool) -> list[jax.Array]:
    """(b, h, f, v + 1) as the columns (b, h, features, v) and the normaliser's row (b, h, 1, features)."""
    state = jnp.pad(state, ((0, 0), (0, 0), (0, features - state.shape[2]), (0, 0)))
    return [state[..., :-1], state[..., -1][:, :, None]] if normalise else [state]


def joined(parts, features: int) -> jax.Array:
    """A state as the front door has it, (b, h, features, v + 1), of a walk's parts: its values, and its normaliser
    as rows if it has one."""
    state = parts[0] if len(parts) == 1 else jnp.concatenate([parts[0], jnp.swapaxes(parts[1], 2, 3)], axis=3)
    return state[:, :, :features]


def _cost(shape: Shape, dtype, arrays, outputs) -> pl.CostEstimate:
    tokens, scored = shape.b * shape.h * shape.t, shape.chunk * (shape.key_dim + shape.value_dim)
    flops = (
        2 * tokens * (scored + shape.features * (2 * shape.value_dim + 4 * shape.key_dim)) * max(1, len(outputs) - 1)
    )
    return pl.CostEstimate(
        flops=flops, bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)), transcendentals=0
    )
