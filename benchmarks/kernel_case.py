"""A case of `bench kernels`: an operation at a shape, how it is called and what it is compared with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    operation, variant: what it is, in the words of the tables. sizes: the shape. inputs(key, dtype) -> arrays.
    run(arrays, backend) -> output; where the operation takes documents, arrays may hold `segment_ids` (b, t) besides.
    work: FLOPs of the forward pass that no form can avoid (products with the state; a chunk's own products come on top;
    for softmax attention, products of the pairs that are seen). plain: name -> function of the arrays to the
    same output without this project's operation.
    peer: its name in kernel_peers.py, or None. small: sizes, beside few sequences, heads and tokens, that errors are
    looked at with. libraries: those of LIBRARIES that are backends of it.
    """

    operation: str
    variant: str
    sizes: dict[str, int]
    inputs: Callable[[jax.Array, Any], Arrays]
    run: Callable[[Arrays, str | None], jax.Array]
    work: float
    plain: Mapping[str, Callable[[Arrays], jax.Array]] = dataclasses.field(default_factory=dict)
    peer: str | None = None
    small: Mapping[str, int] = dataclasses.field(default_factory=dict)
    libraries: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.variant}, " + " ".join(f"{name}{size}" for name, size in self.sizes.items())


LIBRARIES = ("cudnn", "splash", "jla")
"""Backends that one operation has and the others lack."""


def normal(shapes: Mapping[str, tuple[int, ...]]) -> Callable[[jax.Array, Any], Arrays]:
    """Returns the function (key, dtype) -> arrays of these shapes, drawn from the standard normal distribution."""

    def inputs(key: jax.Array, dtype: Any) -> Arrays:
        keys = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
        return {name: jax.random.normal(each, shape).astype(dtype) for each, (name, shape) in keys}

    return inputs


def sizes_of(**sizes: int | None) -> dict[str, int]:
    """Returns the sizes that are not None."""
    return {name: size for name, size in sizes.items() if size is not None}
