"""What Mosaic TPU kernels share: the call of a kernel whose arrays have names, and a product of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recollect.pallas_kernels import dispatch

Semantics = Sequence[Literal["parallel", "arbitrary"]]
Input = tuple[str, jax.Array, pl.BlockSpec]
Output = tuple[str, jax.ShapeDtypeStruct, pl.BlockSpec]


def call(
    kernel: Callable[..., None],
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    *,
    grid: tuple[int, ...],
    dimension_semantics: Semantics,
    flops: int,
    transcendentals: int = 0,
    scratch: Sequence[Any] = (),
    name: str,
) -> dict[str, jax.Array]:
    """Runs kernel(references by name of inputs and outputs, *scratch references), simulated inside
    `dispatch.interpreted`; returns its outputs by name."""
    names = [entry[0] for entry in (*inputs, *outputs)]
    how = dispatch.interpretation()

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs, strict=False)), *refs[len(names) :])

    arrays: list[Any] = [entry[1] for entry in (*inputs, *outputs)]
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for *_, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[shape for _, shape, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(dimension_semantics)),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved),
        interpret=pltpu.InterpretParams(detect_races=True) if how == "races" else how == "values",
        name=name,
    )(*(x for _, x, _ in inputs))
    return dict(zip((entry[0] for entry in outputs), results, strict=True))


def product(a: jax.Array, b: jax.Array, of_a: int = 1, of_b: int = 0) -> jax.Array:
    """Returns the sums of products of two matrices over axis of_a of a and of_b of b, fp32; fp32 factors enter with all
    their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
